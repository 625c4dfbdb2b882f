"""download.py, against a folder in place of the network."""

import hashlib
import threading

import pytest
import torch
from conftest import build_tiny

import download
from checkpointing import published
from runtime.cli import UserError


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web").mkdir()
    torch.save(build_tiny().state_dict(), tmp_path / "web" / "DiT-XL-2-256x256.pt")
    monkeypatch.setattr(published, "PRETRAINED_URL", (tmp_path / "web").as_uri() + "/")
    return tmp_path


def test_published_weights_by_name(weights):
    state = download.find_model("DiT-XL-2-256x256.pt")
    assert set(state) == set(build_tiny().state_dict())
    assert (weights / "pretrained_models" / "DiT-XL-2-256x256.pt").exists()


def test_local_file(weights):
    torch.save(dict(model=dict(a=torch.ones(1)), ema=dict(a=torch.zeros(1))), weights / "mine.pt")
    assert download.find_model("mine.pt")["a"] == 0 and download.find_model("mine.pt", "raw")["a"] == 1


def test_many_download_once(weights, monkeypatch):
    fetched, fetch = [], torch.hub.download_url_to_file

    def count(url, path, **options):
        fetched.append(url)
        fetch(url, path, **options)

    monkeypatch.setattr(torch.hub, "download_url_to_file", count)
    threads = [
        threading.Thread(target=published.download_model, args=("DiT-XL-2-256x256.pt",)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_inception_weights(weights, monkeypatch):
    """The published file, told by its checksum; anything else in its place is refused and not kept."""
    path = weights / "pretrained_models" / published.INCEPTION_WEIGHTS
    source = weights / "web" / published.INCEPTION_WEIGHTS
    source.write_bytes(b"another file")
    monkeypatch.setattr(published, "INCEPTION_URL", (weights / "web").as_uri() + "/")
    with pytest.raises(UserError, match=r"6726825d\.pth: could not be downloaded .*, or it is another file"):
        published.download_inception()
    assert not path.exists()
    monkeypatch.setattr(published, "INCEPTION_SHA256", hashlib.sha256(b"another file").hexdigest())
    assert published.download_inception() == str(path.relative_to(weights))
    source.unlink()
    assert published.download_inception() and path.read_bytes() == b"another file"


def refusal(call, *args):
    with pytest.raises(UserError, match=r"\.pt: could not be downloaded .* check the network") as refused:
        call(*args)
    assert "\n" not in str(refused.value)


def test_what_is_not_there(weights):
    refusal(published.download_model, "DiT-XL-2-512x512.pt")
    assert not (weights / "pretrained_models" / "DiT-XL-2-512x512.pt").exists()


def test_a_download_cut_short_is_not_taken_for_whole(weights):
    """A server that closes early: nothing stands under the name, and the next call fetches anew."""
    source = weights / "web" / "DiT-XL-2-256x256.pt"
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    refusal(download.find_model, "DiT-XL-2-256x256.pt")
    assert not (weights / "pretrained_models" / "DiT-XL-2-256x256.pt").exists()
    source.write_bytes(whole)
    assert set(download.find_model("DiT-XL-2-256x256.pt")) == set(build_tiny().state_dict())
