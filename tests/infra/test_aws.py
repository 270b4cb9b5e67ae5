"""The policies permit exactly the calls in the code; `tests/faults/test_policies.py` runs each role with its policy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra/aws"
ROLES = ["producer", "dispatcher", "worker", "watch"]
S3 = {
    "get_paginator": "s3:ListBucket",  # of list_objects_v2
    "list_objects_v2": "s3:ListBucket",
    "head_object": "s3:GetObject",
    "get_object": "s3:GetObject",
    "download_file": "s3:GetObject",
    "generate_presigned_url": "s3:GetObject",  # a link has the permissions of its signer
    "put_object": "s3:PutObject",
}
LOCAL_ONLY = {"create_bucket", "close", "meta"}
SQS = {"receive_message": "sqs:ReceiveMessage", "delete_message_batch": "sqs:DeleteMessage"}


def read_statements(role: str) -> list[dict[str, Any]]:
    return list(json.loads((FOLDER / f"{role}.json").read_text())["Statement"])


def granted(role: str) -> set[tuple[str, str]]:
    return {(action, arn) for one in read_statements(role) for action in one["Action"] for arn in one["Resource"]}


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")


@pytest.mark.parametrize("role", ROLES)
def test_iam_accepts_each_policy(role: str, credentials: None) -> None:
    document = (FOLDER / f"{role}.json").read_text()
    with mock_aws():
        iam = boto3.client("iam", region_name="us-east-1")
        iam.create_policy(PolicyName=role, PolicyDocument=document)
        with pytest.raises(iam.exceptions.MalformedPolicyDocumentException):
            iam.create_policy(PolicyName="broken", PolicyDocument=document.replace("Allow", "Let"))


def test_the_policies_grant_exactly_the_calls_in_the_code() -> None:
    store = (
        set(re.findall(r"self\._(?:s3|clients\[[^]]+\])\.(\w+)", (ROOT / "jobs/s3/client.py").read_text())) - LOCAL_ONLY
    )
    queue = set(re.findall(r"self\._sqs\.(\w+)", (ROOT / "jobs/sqs.py").read_text())) - {"close"}

    assert store == set(S3), "a new call: grant it to the roles that make it, and add it here"
    assert queue == set(SQS)
    assert {action for role in ROLES for action, _ in granted(role)} == {*S3.values(), *SQS.values()}


def test_only_workers_write_results_and_only_under_the_destination() -> None:
    writes = {role: {arn for action, arn in granted(role) if action == "s3:PutObject"} for role in ROLES}

    assert writes["worker"] == {"arn:aws:s3:::DESTINATION/*"}
    assert writes["producer"] == writes["dispatcher"] == {"arn:aws:s3:::DESTINATION/*_cutfleet/*"}
    assert writes["watch"] == set()


def test_the_dispatcher_never_reads_a_source() -> None:
    assert not [arn for _, arn in granted("dispatcher") if "SOURCE" in arn]
    packages = ("dispatcher", "records", "webhooks")
    for path in (path for package in packages for path in (ROOT / "producer" / package).glob("*.py")):
        text = path.read_text()
        assert "list_source" not in text
        assert 'role="source"' not in text


def test_only_the_source_bucket_may_send_events() -> None:
    (one,) = read_statements("queue")

    assert one["Action"] == ["sqs:SendMessage"]
    assert one["Condition"]["ArnEquals"] == {"aws:SourceArn": "arn:aws:s3:::SOURCE"}
    assert one["Resource"] == read_statements("watch")[0]["Resource"]
