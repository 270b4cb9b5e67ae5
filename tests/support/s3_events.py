"""S3 event notifications as AWS sends them."""

from __future__ import annotations

from typing import Any


def s3_event(
    key: str,
    *,
    bucket: str = "shop",
    name: str = "ObjectCreated:Put",
    etag: str = "d41d8cd9",
    sequencer: str = "0A1B",
) -> Any:
    """Return the event of AWS's "Event message structure", version 2.1. `key`: URL-encoded, as S3 sends it."""
    return {
        "Records": [
            {
                "eventVersion": "2.1",
                "eventSource": "aws:s3",
                "awsRegion": "us-west-2",
                "eventTime": "1970-01-01T00:00:00.000Z",
                "eventName": name,
                "userIdentity": {"principalId": "AIDAJDPLRKLG7UEXAMPLE"},
                "requestParameters": {"sourceIPAddress": "127.0.0.1"},
                "responseElements": {"x-amz-request-id": "C3D13FE58DE4C810"},
                "s3": {
                    "s3SchemaVersion": "1.0",
                    "configurationId": "testConfigRule",
                    "bucket": {
                        "name": bucket,
                        "ownerIdentity": {"principalId": "A3NL"},
                        "arn": f"arn:aws:s3:::{bucket}",
                    },
                    "object": {"key": key, "size": 1024, "eTag": etag, "sequencer": sequencer},
                },
            }
        ]
    }
