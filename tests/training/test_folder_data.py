"""Folders of pictures for training: captions, repeats, buckets and the order of batches."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from minisd.training.folder_data import BucketOrder, Pictures, bucket_sizes, list_examples, nearest_size
from minisd.training.sampling_order import Shuffled


def picture(path: Path, size: tuple[int, int] = (40, 32), color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def test_captions_beside_pictures_and_repeats_of_folders(tmp_path):
    picture(tmp_path / "10_dog/a.png").with_suffix(".txt").write_text("\ufeffa brown\n dog ", encoding="utf-8")
    picture(tmp_path / "10_dog/b.JPG")
    picture(tmp_path / "3_red cat/c.webp").with_suffix(".caption").write_text("a cat")
    found = [(each.path.name, each.text, each.repeats) for each in list_examples(tmp_path)]
    assert found == [("a.png", "a brown dog", 10), ("b.JPG", "dog", 10), ("c.webp", "a cat", 3)]
    picture(tmp_path / "d.png")
    assert list_examples(tmp_path, "a thing")[-1].text == "a thing"
    with pytest.raises(ValueError, match=r"d.png has no caption; write d.txt beside it"):
        list_examples(tmp_path)
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"d.txt is not UTF-8 text"):
        list_examples(tmp_path)


def test_metadata_in_both_formats_of_imagefolder(tmp_path):
    picture(tmp_path / "sub/a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\nsub/a.png,"a dog, running"\n')
    assert [(each.path, each.text) for each in list_examples(tmp_path)] == [(tmp_path / "sub/a.png", "a dog, running")]
    for text in (None, 3, ["a"]):
        (tmp_path / "metadata.csv").unlink(missing_ok=True)
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "sub/a.png", "text": text}))
        with pytest.raises(ValueError, match="line 1: expected a picture and its text"):
            list_examples(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name\nsub/a.png\n")
    with pytest.raises(ValueError, match="both"):
        list_examples(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"line 1: expected a picture and its text \(KeyError: 'text'\)"):
        list_examples(tmp_path)


def test_pictures_by_links_from_elsewhere_are_refused(tmp_path):
    outside = picture(tmp_path / "x.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").symlink_to(outside)
    with pytest.raises(ValueError, match="without links"):
        list_examples(tmp_path / "a", "x")


def test_buckets_are_those_of_kohya_s_trainer():
    """The list that make_bucket_resolutions((512, 512), 256, 1024, 64) of kohya-ss/sd-scripts prints."""
    wanted = {(256, 1024), (320, 768), (384, 640), (448, 576), (512, 512)}
    wanted |= {(576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)}
    wanted |= {(h, w) for w, h in wanted}
    assert set(bucket_sizes(512, 64)) == wanted
    assert nearest_size((1600, 900), bucket_sizes(512, 64)) == (640, 384)
    assert nearest_size((90, 400), bucket_sizes(512, 64)) == (256, 1024)


def test_pictures_are_scaled_to_cover_and_cropped(tmp_path):
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    image.save(tmp_path / "a.png")
    examples = list_examples(tmp_path, "x")
    squares = Pictures(examples, 32, 8, crop="random")
    assert squares.sizes == [(32, 32)] and not squares.fixed
    red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
    for place, flip, color in (((0.0, 0.5), False, red), ((1.0, 0.5), False, blue)):
        cropped = squares.image(0, place, flip)
        assert cropped.shape == (1, 3, 32, 32) and torch.equal(cropped[0, :, 16, 16], color)
    whole = Pictures(examples, 32, 8, buckets=True)
    ((width, height),) = whole.sizes
    assert width >= 1.5 * height and width % 8 == height % 8 == 0 and width * height <= 32 * 32
    assert torch.equal(whole.image(0, flip=True), whole.image(0).flip(-1))
    assert torch.equal(whole.image(0, flip=True)[0, :, 4, 2], blue)
    with pytest.raises(ValueError, match="side=36; expected a multiple of 8"):
        Pictures(examples, 36, 8)


def test_batches_hold_one_size_and_an_epoch_every_repeat():
    sizes, repeats = ["a"] * 5 + ["b"] * 4, [1, 1, 1, 1, 2, 1, 1, 3, 1]
    order = BucketOrder(sizes, repeats, seed=4)
    batches = [order(range(2 * step, 2 * step + 2)) for step in range(6)]  # 6 of a, and 6 of b
    assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)
    assert Counter(index for batch in batches for index in batch) == Counter(dict(enumerate(repeats)))
    again = [order(range(2 * step, 2 * step + 2)) for step in range(6, 12)]
    assert Counter(sum(again, [])) == Counter(sum(batches, [])) and again != batches
    assert [order(range(2 * step, 2 * step + 2)) for step in (3, 0)] == [batches[3], batches[0]]
    assert len(order(range(50))) == 50
    one = BucketOrder(["a"] * 7, [1] * 7, seed=3)
    assert one(range(3, 9)) == Shuffled(7, 3)(range(3, 9))
