"""Location of an object or a prefix in S3. `s3://` text is parsed here and nowhere else."""

from __future__ import annotations

import dataclasses

from jobs.errors import SettingsError

SCHEME = "s3://"
MAX_KEY_BYTES = 1024
"""S3's own limit for a key, in UTF-8 bytes."""


@dataclasses.dataclass(frozen=True)
class Location:
    """`s3://BUCKET/KEY`; as a prefix, `key` may be empty and matches as S3 does: by its first characters."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}"

    @classmethod
    def parse(cls, uri: str) -> Location:
        """Raises `SettingsError` for text that is not an s3:// URI."""
        bucket, _, key = uri.removeprefix(SCHEME).partition("/")
        if not uri.startswith(SCHEME) or not bucket:
            raise SettingsError(f"{uri!r} is not an S3 location: write s3://BUCKET/PREFIX.")
        return cls(bucket, key)

    def at(self, key: str) -> Location:
        """Return the location of `key`, complete, in the same bucket."""
        return Location(self.bucket, key)

    def below(self, relative: str) -> Location:
        """Return this location with `relative` appended."""
        return Location(self.bucket, self.key + relative)

    @property
    def folder(self) -> str:
        """The key up to and including its last `/`."""
        return self.key[: self.key.rfind("/") + 1]

    @property
    def key_bytes(self) -> int:
        """Length of the key in UTF-8 bytes, as S3 counts it."""
        return len(self.key.encode(errors="surrogatepass"))


def is_s3_uri(text: str) -> bool:
    return text.startswith(SCHEME)


def parse_destination(uri: str) -> Location:
    """Parse a destination prefix, which always ends with `/`: outputs go below it, never beside it."""
    location = Location.parse(uri)
    return location.at(location.key.rstrip("/") + "/" if location.key.strip("/") else "")
