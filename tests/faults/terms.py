"""What fault tests and their stand-in workers agree on."""

MODEL = "stand-in"
VISIBILITY_S = 4
"""In place of the broker's own: a dead worker's messages come back within seconds."""
SOCKET_S = 4
"""How long clients wait for a server that does not answer, in place of up to 30 s."""
LOCK_S = 2
"""How long a dead dispatcher's lock lasts, in place of 10 s."""
TURN_S = 0.2
"""Between two turns of an idle dispatcher, in place of 1 s."""
PLACES = ("after_claim", "after_fetch", "after_model", "after_mask", "after_cutout", "before_commit", "before_ack")
"""Where a failpoint kills."""
SEGFAULT, HANG, EXHAUST = b"#segfault#", b"#hang#", b"#exhaust#"
"""Behind the end of a JPEG, where decoders ignore them: what the stand-in's decoder does with the image."""
LEAK, LEAK_BYTES = b"#leak#", 60_000_000
"""Likewise: its process keeps so much for ever."""
LOCK = b"#lock#"
"""Likewise: it keeps the interpreter lock for ever."""
DEVICE_SEGFAULT = 231
"""An image all of this level takes the stand-in device's process down."""
DEVICE_GREY = 251
"""An image all of this level breaks the stand-in device."""
DEVICE_HANGS = 241
"""An image all of this level hangs it."""
