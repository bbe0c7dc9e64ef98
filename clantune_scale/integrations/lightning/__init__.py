"""A clan in Lightning's Trainer: ``Trainer(callbacks=[ClanCallback("clan.json")])``."""

from clantune_scale.core.extras import require

require("lightning", needed_by="clantune_scale.integrations.lightning")

from clantune_scale.integrations.lightning.callback import ClanCallback  # noqa: E402 - after what names the extra

__all__ = ["ClanCallback"]
