"""A clan in Hugging Face's Trainer: ``Trainer(..., callbacks=[ClanCallback()])``."""

from clantune_scale.core.extras import is_installed, missing

if not is_installed("transformers"):
    raise missing("transformers", needed_by="clantune_scale.integrations.transformers")

from clantune_scale.integrations.transformers.callback import ClanCallback

__all__ = ["ClanCallback"]
