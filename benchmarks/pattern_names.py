"""Names of patterns in results, "hash16" or "qk50": a method and its number, and the same in words."""

WORDS = {
    "hash": "{} buckets",
    "centred": "{} buckets, centred",
    "qk": "{} % of q and k dropped",
    "none": "none",
    "dense": "cuDNN dense",
    "mha": "JAX's Pallas-Triton flash",
}


def parted(name: str) -> tuple[str, str]:
    """Returns the method and the digits of its number, of which some have none."""
    method = name.rstrip("0123456789")
    return method, name.removeprefix(method)


def words(name: str) -> str:
    """Returns a pattern, or what attends in a training step, in words."""
    method, number = parted(name)
    return WORDS[method].format(number)


def brief(name: str) -> str:
    """Returns the same for where it is clear what is dropped: "50 % dropped"."""
    return words(name).replace(" of q and k", "")
