"""SQS queue that receives S3 event notifications. Region, credentials and `AWS_ENDPOINT_URL_SQS` (for a test server)
are boto3's own settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.errors import CutfleetError, ServiceUnavailable, SettingsError

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

MAX_MESSAGES = 10
"""SQS's limit for one receive and for one delete."""
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
class SqsMessage:
    """`receipt`: for `delete`. SQS delivers a message again after the visibility timeout unless it is deleted."""

    body: str
    receipt: str


class SqsQueue:
    """One boto3 client for one queue; safe for threads."""

    def __init__(self, url: str) -> None:
        import boto3
        from botocore.config import Config

        self._url = url
        config = Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 3})
        try:
            self._sqs: SQSClient = boto3.session.Session().client("sqs", config=config)
        except Exception as exc:
            raise _map_sqs_error(exc, url) from exc

    def receive(self, *, wait_s: int) -> list[SqsMessage]:
        """Return up to ten messages; wait at most `wait_s` (SQS's limit: 20) for the first."""
        try:
            answer = self._sqs.receive_message(
                QueueUrl=self._url, MaxNumberOfMessages=MAX_MESSAGES, WaitTimeSeconds=wait_s
            )
        except Exception as exc:
            raise _map_sqs_error(exc, self._url) from exc
        return [SqsMessage(found["Body"], found["ReceiptHandle"]) for found in answer.get("Messages", [])]

    def delete(self, messages: Sequence[SqsMessage]) -> None:
        """Safe to repeat. A message that SQS fails to delete is delivered again; its images are known by then."""
        for first in range(0, len(messages), MAX_MESSAGES):
            batch = messages[first : first + MAX_MESSAGES]
            try:
                self._sqs.delete_message_batch(
                    QueueUrl=self._url,
                    Entries=[{"Id": str(i), "ReceiptHandle": message.receipt} for i, message in enumerate(batch)],
                )
            except Exception as exc:
                raise _map_sqs_error(exc, self._url) from exc

    def close(self) -> None:
        self._sqs.close()

    def __enter__(self) -> SqsQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _map_sqs_error(exc: Exception, url: str) -> CutfleetError:
    """Return our error for `exc`. Raises `exc` itself when it is not botocore's: a bug."""
    from botocore import exceptions as botocore

    if isinstance(exc, botocore.ClientError):
        code = exc.response["Error"].get("Code", "")
        text = f"{code} {exc.response['Error'].get('Message', '')}".strip()
        if code in _NO_QUEUE:
            return SettingsError(f"There is no SQS queue {url}: {text}. Check its URL and AWS_REGION.", code="no_queue")
        if code in _DENIED:
            return ServiceUnavailable(
                f"SQS refuses access to {url}: {text}. Our credentials need sqs:ReceiveMessage and sqs:DeleteMessage.",
                code="queue_denied",
            )
        return ServiceUnavailable(f"SQS answered {text} for {url}.", code="queue_failed")
    if isinstance(exc, (botocore.NoRegionError, botocore.ProfileNotFound, ValueError)):
        return SettingsError(f"SQS settings: {exc}. Check AWS_REGION and AWS_PROFILE.")
    if isinstance(exc, (botocore.BotoCoreError, OSError)):
        return ServiceUnavailable(f"SQS at {url} can't be reached: {exc}", code="queue_unreachable")
    raise exc
