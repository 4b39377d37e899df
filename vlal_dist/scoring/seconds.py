"""Where the time of scoring goes, by stage."""

from dataclasses import dataclass


@dataclass
class Seconds:
    """Where the time of a shard went; of threads side by side the sum.

    Attributes:
        fetch, decode: reading crops from the store; JPEG to the encoder's input.
        copy, encode: gathering a batch and sending it off; the encoder, until its vectors are here.
        write: similarities, and the commit of the file.
    """

    fetch: float = 0.0
    decode: float = 0.0
    copy: float = 0.0
    encode: float = 0.0
    write: float = 0.0
