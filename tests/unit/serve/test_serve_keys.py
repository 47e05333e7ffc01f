"""API keys: kept as hashes, found by the secret, ended for good; and what a gateway refuses without them."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from chaccu.errors import StorageError, UsageError
from chaccu.serve.gateway.access.keys import KeyFile, KeyRing, Scope, hash_key
from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.http.admission import Admission
from chaccu.serve.gateway.http.metrics import GatewayMetrics


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def test_only_a_hash_is_kept_for_the_owner_alone(file: KeyFile) -> None:
    shown, key = file.create("alice")
    text = file.path.read_text()
    assert shown not in text
    assert shown.removeprefix(f"sk-chaccu-{key.id}-") not in text
    assert shown.startswith(f"sk-chaccu-{key.id}-")
    assert len(shown.rpartition(f"{key.id}-")[2]) == 43
    assert file.read() == [key]
    assert key.hash == hash_key(shown)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_two_keys_of_one_name_differ_and_writers_at_once_lose_none(file: KeyFile) -> None:
    threads = [threading.Thread(target=file.create, args=("same",)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({key.id for key in file.read()}) == len({key.hash for key in file.read()}) == 12


def test_wrong_uses_are_refused(file: KeyFile) -> None:
    with pytest.raises(UsageError, match="no scope 'root'"):
        file.create("alice", ["chat", "root"])
    with pytest.raises(UsageError, match="needs a scope"):
        file.create("alice", [])
    for name in ("", "a\nb", "x" * 101):
        with pytest.raises(UsageError, match="no name"):
            file.create(name)
    assert not file.path.exists()
    with pytest.raises(StorageError, match="no file"):
        file.read()
    file.path.write_text("[]")
    with pytest.raises(StorageError, match="holds no keys"):
        file.read()


def test_a_revoked_key_stays_listed_and_is_found_no_more(file: KeyFile) -> None:
    clock = Clock()
    shown, key = file.create("alice")
    ring = KeyRing(file, clock)
    assert ring.find(shown) == key
    ended = file.revoke(key.id)
    assert file.revoke(key.id) == ended
    assert [one.revoked for one in file.read()] == [ended.revoked] != [""]
    assert ring.find(shown) == key, "the file is looked at once a second"
    clock.now_s += 1
    assert ring.find(shown) is None
    assert not ring.is_good(key.id)
    with pytest.raises(UsageError, match="has no key 'nothing'"):
        file.revoke("nothing")


def test_a_new_key_is_known_within_a_second_and_a_broken_file_changes_nothing(file: KeyFile) -> None:
    clock = Clock()
    first, _ = file.create("alice")
    ring = KeyRing(file, clock)
    second, _ = file.create("bob")
    clock.now_s += 1
    assert ring.find(second) is not None
    file.path.write_text("{")
    clock.now_s += 1
    assert ring.find(first) is not None
    file.path.unlink()
    clock.now_s += 1
    assert ring.find(second) is not None


def shows(shown: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"h"), (b"authorization", b"Bearer " + shown.encode())]


def refusal(admission: Admission, headers: list[tuple[bytes, bytes]], scope: Scope = "chat") -> tuple[int, str | None]:
    with pytest.raises(ApiError) as refused:
        admission.identify(headers, scope)
    assert "sk-" not in refused.value.message
    return refused.value.status, refused.value.code


class TestAdmission:
    def test_without_keys_chat_is_open_and_administration_on_loopback_alone(self) -> None:
        local = Admission(GatewayConfig(), GatewayMetrics(), Clock())
        assert local.identify([]) is local.identify([], "admin") is None
        public = Admission(GatewayConfig(host="0.0.0.0", is_open=True), GatewayMetrics(), Clock())
        assert public.identify([]) is None
        assert refusal(public, [], "admin") == (403, "insufficient_permissions")

    def test_with_keys_a_good_one_of_the_scope_is_needed(self, file: KeyFile) -> None:
        chat, key = file.create("alice")
        admin, _ = file.create("root", ["admin"])
        worker, _ = file.create("gpu", ["worker"])
        both, _ = file.create("both", ["admin", "chat"])
        admission = Admission(GatewayConfig(keys=file.path), GatewayMetrics(), Clock())
        assert admission.identify(shows(chat)) == key
        assert admission.identify([(b"x-api-key", chat.encode())]) == key
        assert admission.identify([(b"authorization", b"bearer  " + chat.encode())]) == key
        assert refusal(admission, []) == (401, "missing_api_key")
        assert refusal(admission, [(b"authorization", b"Basic abc")]) == (401, "missing_api_key")
        for wrong in (chat[:-1], chat + "x", "", "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"), key.hash):
            assert refusal(admission, shows(wrong)) == (401, "invalid_api_key")
        for other in (admin, worker):
            assert refusal(admission, shows(other)) == (403, "insufficient_permissions")
        assert refusal(admission, shows(chat), "admin") == (403, "insufficient_permissions")
        assert refusal(admission, shows(chat), "metrics") == (403, "insufficient_permissions")
        assert admission.identify(shows(admin), "metrics") is not None
        assert admission.identify(shows(both)) is not None

    def test_a_key_is_good_for_its_models_alone(self, file: KeyFile) -> None:
        _, bound = file.create("alice", models=["a", "b"])
        Admission.check_model(bound, "b")
        Admission.check_model(None, "c")
        with pytest.raises(ApiError, match="may not use the model 'c'; it is for a, b") as refused:
            Admission.check_model(bound, "c")
        assert (refused.value.status, refused.value.code) == (403, "model_not_allowed")

    def test_only_a_worker_key_stands_for_the_join_token(self, file: KeyFile) -> None:
        chat, _ = file.create("alice")
        worker, key = file.create("gpu", ["worker"])
        admission = Admission(GatewayConfig(keys=file.path), GatewayMetrics(), Clock())
        assert admission.worker_key(worker) == key
        assert admission.worker_key(chat) is admission.worker_key("") is None
        assert Admission(GatewayConfig(), GatewayMetrics(), Clock()).worker_key(worker) is None
