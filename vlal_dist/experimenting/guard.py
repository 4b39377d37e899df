"""What a run was trained with, compared with what the configuration says now."""

from collections.abc import Mapping

from vlal_dist.errors import ConfigError

EXECUTION = frozenset(
    {
        "data.threads",
        "data.cache_bytes",
        "data.decoded_bytes",
        "training.threads",
        "training.log_steps",
        "training.checkpoint_epochs",
        "training.checkpoint_steps",
        "training.keep_checkpoints",
        "method.psl_prior",
    }
)
"""Keys that do not decide what is learned (the prior's place follows from the root)."""


def flat_settings(sections: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Dotted key -> value of everything that decides a run's result, in the given order."""
    flat = {
        f"{section}.{key}": value
        for section, keys in sections.items()
        for key, value in keys.items()
    }
    return {key: value for key, value in flat.items() if key not in EXECUTION}


def check_same(recorded: Mapping[str, object], now: Mapping[str, object], *, where: str) -> None:
    """Refuse to count a run that was trained with other settings.

    Args:
        recorded: `flat_settings` of the configuration that training wrote.
        now: those of the run as it would be started now.
        where: the run root, for the error.

    Raises:
        ConfigError: names the first key that differs, both values, and the remedy.
    """
    for key, value in now.items():
        if recorded.get(key) != value:
            raise ConfigError(
                f"{where} was trained with {key} {recorded.get(key)!r}, now it is {value!r}; set "
                "it back, or give another paths.experiments"
            )
