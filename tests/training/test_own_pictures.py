"""A model from scratch on a folder of pictures: the three commands, and their result in minisd and diffusers."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from forked import module, together
from PIL import Image

from minisd import StableDiffusion
from minisd.app.cli import main
from minisd.config import TINY
from minisd.training.own_pictures import OwnPictures, read_sizes

SIZES = {
    "autoencoder": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "unet": {
        "block_out_channels": [16, 32, 32], "norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 2,
    },
    "image_encoder": {"widths": [16, 16], "patch": 8, "groups": 4, "pooled": 2, "projection_dim": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "pictures"
    for name, count in (("2_a red square", 2), ("1_a blue square", 4)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = Image.new("RGB", (48, 40), "white")
            image.paste("red" if "red" in name else "blue", (4 * index, 4, 4 * index + 16, 20))
            image.save(folder / name / f"{index}.png")
    return folder


def test_own_pictures_have_the_interface_of_scenes(pictures):
    data = OwnPictures(pictures, 32)
    assert len(data) == 2 * 2 + 4 and data.captions == ["a blue square"] * 4 + ["a red square"] * 4
    assert data.images([7, 0]).shape == (2, 3, 32, 32) and torch.equal(data.images([6]), data.images([7]))
    assert data.held_out().shape == (6, 32, 32, 3)


def write_shard(path: Path, files: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> None:
    with tarfile.open(path, "w") as shard:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content) if kind == tarfile.REGTYPE else 0, kind
            shard.addfile(member, io.BytesIO(content))


def encoded(color: str, suffix: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), color).save(file, suffix, lossless=True)
    return file.getvalue()


def test_shards_of_webdataset(tmp_path):
    red, blue, green = encoded("red", "png"), encoded("blue", "webp"), encoded("#00ff00", "bmp")
    write_shard(tmp_path / "1.tar", [("b/2.bmp", green)])
    files = [("0.png", red), ("0.txt", b"\xef\xbb\xbfa  red\nsquare"), ("a/1.WEBP", blue), ("a/1.cls", b"3")]
    files += [("a/1.json", b'{"text": "a blue square", "width": 20}'), ("a/._1.png", b"x"), ("2.txt", b"alone")]
    write_shard(tmp_path / "0.tar", files)
    data = OwnPictures(tmp_path, 16, caption="a thing")
    assert data.captions == ["a red square", "a blue square", "a thing"] and len(data) == 3
    assert data.unique.shape == (3, 16, 16, 3)
    assert data.unique[:, 8, 8].tolist() == [[255, 0, 0], [0, 0, 255], [0, 255, 0]]
    with pytest.raises(ValueError, match=r"1.tar: b/2 has no caption; put 2.txt beside it"):
        OwnPictures(tmp_path, 16)


def test_bad_shards(tmp_path):
    path, red = tmp_path / "0.tar", encoded("red", "png")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        write_shard(path, [("0.png", b"")], kind)
        with pytest.raises(ValueError, match=r"0.tar: 0.png is no regular file"):
            OwnPictures(tmp_path, 16)
    for files, words in (
        ([("0.png", red[:40]), ("0.txt", b"x")], "0.png is not a valid image"),
        ([("0.png", red), ("0.txt", b"\xff\xfe")], "utf-8"),
        ([("0.png", red), ("0.json", b'{"text": 3}')], "0 has no caption"),
        ([("0.png", red), ("0.json", b"{")], "Expecting property name"),
        ([("0.txt", b"a fox")], "has no pictures"),
    ):
        write_shard(path, files)
        with pytest.raises(ValueError, match=rf"0.tar.*{words}"):
            OwnPictures(tmp_path, 16)
    write_shard(path, [("0.png", red), ("0.txt", b"x")])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"0.tar: unexpected end of data"):
        OwnPictures(tmp_path, 16)
    (tmp_path / "1.png").write_bytes(red)
    with pytest.raises(ValueError, match=r"both 0.tar and 1.png"):
        OwnPictures(tmp_path, 16)


def test_sizes_of_a_file(tmp_path):
    config, image = read_sizes(None, 64)
    assert (config.unet.sample_size, config.autoencoder.sample_size) == (8, 64)
    assert config.unet.block_out_channels == TINY.unet.block_out_channels
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(SIZES))
    config, image = read_sizes(path, 96)
    assert config.unet.block_out_channels == (16, 32, 32) and config.unet.sample_size == 12 and image.patch == 8
    for content, message in (
        ({"vae": {}}, "has 'vae'; expected text_encoder"), ({"unet": {"width": 3}}, "unet has"),
        ({"unet": {"norm_num_groups": 0}}, "norm_num_groups=0"), ({"unet": 3}, "expected an object"),
        ({"text_encoder": {"hidden_size": 64}}, "cross_attention_dim=128 and text_encoder.hidden_size=64"),
    ):  # fmt: skip
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_sizes(path, 64)


def test_from_pictures_to_a_model(pictures, tmp_path, capsys):
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES))
    own = ["--data", str(pictures), "--side", "32", "--config", str(tmp_path / "sizes.json"), "--device", "cpu"]
    run = ["--steps", "2", "--batch", "4"]
    folders = {part: tmp_path / part for part in ("autoencoder", "clip", "unet")}
    parts = ["--autoencoder", str(folders["autoencoder"] / "export"), "--clip", str(folders["clip"] / "export")]
    for part, folder in folders.items():
        more = parts if part == "unet" else []
        assert main(["train", part, *own, *run, *more, "--output", str(folder)]) == 0
    assert (folders["unet"] / "sheet-000002.png").exists()
    # the same on two processes
    words = ["minisd.training.commands", "unet", *own, *run, *parts, "--output", str(tmp_path / "two")]
    for done in together(2, module, *words):
        assert done.code == 0, done.err[-2000:]
    one, two = ((folder / "losses.jsonl").read_text().splitlines() for folder in (folders["unet"], tmp_path / "two"))
    losses = [[json.loads(line)["loss"] for line in lines] for lines in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    unet = ["--unet", str(folders["unet"] / "export")]
    assert main(["train", "export", str(tmp_path / "model"), *parts, *unet]) == 0
    sd = StableDiffusion.from_pretrained(tmp_path / "model", device="cpu")
    assert sd("a red square", seed=0, num_inference_steps=2).size == (32, 32)
    assert sd.unknown_words("a red dog") == ["dog"]
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    with torch.inference_mode():
        theirs = pipe.encode_prompt("a red square", "cpu", 1, False)[0]
    torch.testing.assert_close(sd.encode_text("a red square"), theirs, rtol=0, atol=1e-5)
    capsys.readouterr()
    assert main(["train", "clip", "--device", "cpu", *run, "--output", str(tmp_path / "x")]) == 2
    assert "--config and --device go with --data" in capsys.readouterr().err
