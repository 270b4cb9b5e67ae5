"""Mailbox: an SQS queue that S3 sends its event notifications to. Besides the store, the only place that knows boto3:
SQS is a service of its own, with its own client and its own errors. Region, credentials and, for a stand-in,
`AWS_ENDPOINT_URL_SQS` are boto3's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.errors import CutfleetError, ServiceUnavailable, SettingsError

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

MAX_LETTERS = 10
"""SQS's own limit for one receive and for one delete."""
_NO_QUEUE = {"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "InvalidAddress"}
_DENIED = {
    "AccessDenied",
    "AccessDeniedException",
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "UnrecognizedClientException",
}


@dataclasses.dataclass(frozen=True)
class Letter:
    """`receipt`: what `delete` needs. Not deleted, it comes again after the queue's visibility timeout."""

    body: str
    receipt: str


class Mailbox:
    """One boto3 client for one queue; may be shared by threads."""

    def __init__(self, url: str) -> None:
        import boto3
        from botocore.config import Config

        self._url = url
        config = Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 3})
        try:
            self._sqs: SQSClient = boto3.session.Session().client("sqs", config=config)
        except Exception as exc:
            raise _mapped(exc, url) from exc

    def receive(self, *, wait_s: int) -> list[Letter]:
        """Up to ten; waits at most `wait_s` (20 is SQS's limit) for the first."""
        try:
            answer = self._sqs.receive_message(
                QueueUrl=self._url, MaxNumberOfMessages=MAX_LETTERS, WaitTimeSeconds=wait_s
            )
        except Exception as exc:
            raise _mapped(exc, self._url) from exc
        return [Letter(found["Body"], found["ReceiptHandle"]) for found in answer.get("Messages", [])]

    def delete(self, letters: Sequence[Letter]) -> None:
        """Safe to repeat. One that SQS fails to delete comes again, and is found to be known."""
        for first in range(0, len(letters), MAX_LETTERS):
            batch = letters[first : first + MAX_LETTERS]
            try:
                self._sqs.delete_message_batch(
                    QueueUrl=self._url,
                    Entries=[{"Id": str(i), "ReceiptHandle": letter.receipt} for i, letter in enumerate(batch)],
                )
            except Exception as exc:
                raise _mapped(exc, self._url) from exc

    def close(self) -> None:
        self._sqs.close()

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mapped(exc: Exception, url: str) -> CutfleetError:
    """What botocore raised, as ours. What is not botocore's is a bug and comes back unmapped."""
    from botocore import exceptions as botocore

    if isinstance(exc, botocore.ClientError):
        code = exc.response["Error"].get("Code", "")
        text = f"{code} {exc.response['Error'].get('Message', '')}".strip()
        if code in _NO_QUEUE:
            return SettingsError(f"There is no SQS queue {url}: {text}. Check its URL and AWS_REGION.", code="no_queue")
        if code in _DENIED:
            return ServiceUnavailable(
                f"SQS refuses us at {url}: {text}. Our credentials need sqs:ReceiveMessage and sqs:DeleteMessage.",
                code="queue_denied",
            )
        return ServiceUnavailable(f"SQS answered {text} for {url}.", code="queue_failed")
    if isinstance(exc, (botocore.NoRegionError, botocore.ProfileNotFound, ValueError)):
        return SettingsError(f"SQS settings: {exc}. Check AWS_REGION and AWS_PROFILE.")
    if isinstance(exc, (botocore.BotoCoreError, OSError)):
        return ServiceUnavailable(f"SQS at {url} can't be reached: {exc}", code="queue_unreachable")
    raise exc
