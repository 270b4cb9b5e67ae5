"""Constants that fault tests and their stand-in workers share: the model's name, shortened times, the failpoints, and
the image contents that trigger a fault."""

MODEL = "stand-in"
VISIBILITY_S = 4
"""Visibility timeout of the broker: the messages of a dead worker return within seconds."""
SOCKET_S = 4
"""Timeout of clients for a server that does not answer; up to 30 s otherwise."""
LOCK_S = 2
"""Lifetime of a dead dispatcher's lock; 10 s otherwise."""
TURN_S = 0.2
"""Pause between two turns of an idle dispatcher; 1 s otherwise."""
FAILPOINTS = ("after_claim", "after_fetch", "after_model", "after_mask", "after_cutout", "before_commit", "before_ack")
"""Steps of a worker at which a test can kill or freeze it."""

# Appended to a JPEG, where decoders ignore them: the stand-in's decoder does this when it decodes the image.
SEGFAULT, HANG, EXHAUST = b"#segfault#", b"#hang#", b"#exhaust#"
LEAK, LEAK_BYTES = b"#leak#", 60_000_000
"""The process never frees `LEAK_BYTES`."""
LOCK = b"#lock#"
"""The process never releases the interpreter lock."""

# Grey level of the whole image: the stand-in device does this when it computes the image.
DEVICE_SEGFAULT = 231
DEVICE_HANGS = 241
DEVICE_GREY = 251
"""The device fails with an error."""
