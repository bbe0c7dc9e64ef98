"""``attach_megatron`` and its config: what the optimizer says and what the config says are one threshold."""

from __future__ import annotations

import pytest

from clantune_scale.errors import ConfigError


# Megatron-core warns of what is not installed beside it.
@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_that_contradicts_the_configs_threshold_is_refused_with_both():
    from clantune_scale.backends.megatron.attach import _require_same_clipping

    said = r"the config says gradient_clipping: 1, and the optimizer has clip_grad=0.5. Build the optimizer with Optim"
    with pytest.raises(ConfigError, match=said):
        _require_same_clipping({"gradient_clipping": 1.0}, 0.5)
    _require_same_clipping({"gradient_clipping": 0.5}, 0.5)
    _require_same_clipping({}, 0.5)
