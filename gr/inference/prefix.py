"""Whether keys and values of a history stay what they are as the user goes on."""

from gr.config import TrainConfig


def prefix_stable(config: TrainConfig) -> bool:
    """Return whether adding events leaves keys and values of earlier tokens as they were.

    Of all events but the newest, whose last token is read at the time of what follows it.
    """
    return not why_unstable(config)


def why_unstable(config: TrainConfig) -> str:
    """Return what makes earlier tokens change when events are added, a setting; "": nothing.

    The context tokens of data.context=prefix carry the time of the request, so that whatever is
    made of their time changes, and of the history what sees it.
    """
    data, model = config.data, config.model
    encoding, hstu = model.encoding, model.hstu
    is_hstu = model.encoder == "hstu"
    has_prefix = data.context == "prefix"
    settings = {
        "model.encoder=dlrm": model.encoder == "dlrm",
        f"model.encoding.position={encoding.position}": encoding.position
        in ("from_session", "from_end"),
        f"model.encoding.time={encoding.time}": encoding.time != "none",
        "model.hstu.truncation": is_hstu and hstu.truncation.layers > 0,
        "model.hstu.semi_local.global_rows": is_hstu and hstu.semi_local.global_rows > 0,
        "model.mixture.*.history": any(group.history for group in model.mixture.values()),
        "data.context=prefix with model.encoding.periodic": has_prefix and bool(encoding.periodic),
        "data.context=prefix with model.encoding.hour_sinusoid": has_prefix
        and encoding.hour_sinusoid,
        "data.context=prefix with model.hstu.bias=position_time": has_prefix
        and is_hstu
        and hstu.bias == "position_time",
        f"data.context=prefix with model.hstu.rotary.angles={hstu.rotary.angles}": has_prefix
        and is_hstu
        and hstu.rotary.angles not in ("none", "position"),
    }
    return next((name for name, holds in settings.items() if holds), "")
