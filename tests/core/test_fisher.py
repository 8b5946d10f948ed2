"""Fisher buffers, files and merging."""

import json
import os

import pytest
import safetensors.torch
import torch

import fiun_fast as ff


def fisher(seed: int = 0, dtype=torch.float32, shapes=None) -> ff.Fisher:
    generator = torch.Generator().manual_seed(seed)
    layout = ff.Layout(shapes or {"fc.weight": (3, 5), "fc.bias": (3,), "scale": ()})
    buffer = torch.rand(layout.numel, generator=generator, dtype=dtype)
    return ff.Fisher(buffer, layout, ff.Provenance("batch", 7, 99))


def test_views_share_the_buffer():
    f = fisher()
    f["fc.bias"].fill_(4)
    assert f.buffer[15:18].eq(4).all()
    assert f.as_dict()["scale"].shape == ()
    assert "19 elements in 3 parameters, float32 on cpu, estimator batch, 7 steps, 99 samples" in repr(f)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dict_round_trip(dtype):
    f = fisher(dtype=dtype)
    again = ff.Fisher.from_dict(f.as_dict())
    assert again.layout == f.layout
    assert torch.equal(again.buffer, f.buffer)
    assert again.buffer.dtype == dtype
    assert again.buffer.data_ptr() != f.buffer.data_ptr()


def test_half_precision_is_widened():
    values = {"w": torch.rand(4).bfloat16(), "v": torch.rand(4).half()}
    f = ff.Fisher.from_dict(values)
    assert f.buffer.dtype == torch.float32
    assert torch.equal(f["w"], values["w"].float())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, ff.ArgumentError, "expected a non-empty dict"),
        ([1], ff.ArgumentError, "expected a non-empty dict"),
        ({"w": 1.0}, ff.ArgumentError, "'w' is a float, expected a tensor"),
        ({"w": torch.ones(2).long()}, ff.DTypeError, "'w' is torch.int64, expected a floating-point tensor"),
        (
            {"w": torch.ones(2), "v": torch.ones(2).double()},
            ff.DTypeError,
            "'v' is torch.float64, expected torch.float32",
        ),
        (
            {"w": torch.ones(2), "v": torch.tensor([1, -2.0, -3])},
            ff.ArgumentError,
            r"'v' has 2 negative entries \(lowest -3",
        ),
        (
            {"w": torch.ones(2), "v": torch.ones(2, device="meta")},
            ff.DeviceError,
            "'v' is on meta, expected cpu as 'w'",
        ),
    ],
)
def test_bad_dicts(values, error, message):
    with pytest.raises(error, match=message):
        ff.Fisher.from_dict(values)


def test_nan_and_inf_pass_from_dict():
    f = ff.Fisher.from_dict({"w": torch.tensor([float("nan"), float("inf"), 0.0])})
    assert f.buffer.isnan().sum() == 1


def test_bad_buffers():
    layout = ff.Layout({"w": (4,)})
    with pytest.raises(ff.DTypeError, match="Fisher buffer is torch.float16, expected float32 or float64"):
        ff.Fisher(torch.zeros(4).half(), layout)
    with pytest.raises(ff.LayoutError, match=r"shape \[5\], expected \[4\]"):
        ff.Fisher(torch.zeros(5), layout)
    with pytest.raises(ff.LayoutError, match="not contiguous"):
        ff.Fisher(torch.zeros(8)[::2], layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_file_round_trip(tmp_path, dtype):
    f = fisher(dtype=dtype)
    f.buffer[3] = float("inf")
    f.save(tmp_path / "f.safetensors")
    again = ff.Fisher.load(tmp_path / "f.safetensors", layout=f.layout)
    assert torch.equal(again.buffer, f.buffer)
    assert again.layout == f.layout  # order included: safetensors alone would sort
    assert again.provenance == ff.Provenance("batch", 7, 99)
    assert os.listdir(tmp_path) == ["f.safetensors"]  # nothing left beside it
    with safetensors.safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata()["version"] == ff.__version__
        assert torch.equal(file.get_tensor("fc.bias"), f["fc.bias"])  # readable without this package


def test_saving_fails_whole(tmp_path, monkeypatch):
    target = tmp_path / "f.safetensors"
    fisher(1).save(target)
    before = target.read_bytes()

    def full_disk(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        fisher(2).save(target)
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["f.safetensors"]
    with pytest.raises(OSError, match="No such file"):
        fisher().save(tmp_path / "missing" / "f.safetensors")


def test_another_layout_is_refused_with_the_difference(tmp_path):
    path = tmp_path / "f.safetensors"
    fisher().save(path)
    expected = ff.Layout({"fc.weight": (4, 5), "fc.bias": (3,), "scale": ()})
    with pytest.raises(ff.LayoutError, match=r"fc.weight is \[3, 5\] in the file and \[4, 5\] in the expected layout"):
        ff.Fisher.load(path, layout=expected)
    reordered = ff.Layout({"scale": (), "fc.bias": (3,), "fc.weight": (3, 5)})
    with pytest.raises(ff.LayoutError, match="the order of the parameters"):
        ff.Fisher.load(path, layout=reordered)


def test_truncated_foreign_and_missing_files(tmp_path):
    path = tmp_path / "f.safetensors"
    fisher().save(path)
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ff.FisherFileError, match="truncated or not a Fisher file"):
            ff.Fisher.load(path)
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    with pytest.raises(ff.FisherFileError, match="not a Fisher of this package"):
        ff.Fisher.load(path)
    metadata = {"format": "fiun_fast.fisher/1", "layout": json.dumps({"w": [4]}), "provenance": "{}"}
    safetensors.torch.save_file({"w": torch.ones(3)}, path, metadata=metadata)
    with pytest.raises(ff.FisherFileError, match=r"truncated or not a Fisher file"):
        ff.Fisher.load(path)
    metadata["provenance"] = json.dumps({"estimator": "batch", "steps": 1, "samples": 1})
    safetensors.torch.save_file({"w": torch.ones(3)}, path, metadata=metadata)
    with pytest.raises(ff.FisherFileError, match=r"'w' is float32 \[3\], expected \[4\] as its layout says"):
        ff.Fisher.load(path)
    metadata["layout"] = json.dumps({"w": [3]})
    safetensors.torch.save_file({"w": -torch.ones(3)}, path, metadata=metadata)
    with pytest.raises(ff.ArgumentError, match="'w' has 3 negative entries"):
        ff.Fisher.load(path)
    with pytest.raises(FileNotFoundError, match="no Fisher file at"):
        ff.Fisher.load(tmp_path / "nothing")
    with pytest.raises(ff.FisherFileError):
        ff.Fisher.load(tmp_path)


def test_to():
    f = fisher()
    assert f.to("cpu") is f
    wide = f.to(dtype=torch.float64)
    assert wide.buffer.dtype == torch.float64
    assert wide.provenance == f.provenance
    with pytest.raises(ff.DTypeError):
        f.to(dtype=torch.float16)


def test_merge_refuses_what_does_not_fit():
    f = fisher()
    for (fishers, options), error, message in [
        (([], {}), ff.ArgumentError, "no Fishers to merge"),
        (([f], {"how": "median"}), ff.ArgumentError, "how is 'median', expected one of max, mean, sum"),
        (([f, f], {"weights": [1.0]}), ff.ArgumentError, "1 weights for 2 Fishers"),
        (([f, f], {"weights": [1.0, -1.0]}), ff.ArgumentError, r"weights\[1\] is -1.0"),
        (([f], {"scale": float("nan")}), ff.ArgumentError, "scale is nan"),
        (([f], {"scale": True}), ff.ArgumentError, "scale is a bool"),
        (
            ([f, fisher(dtype=torch.float64)], {}),
            ff.DTypeError,
            r"fishers\[1\] is torch.float64, expected torch.float32",
        ),
        (([f, fisher(shapes={"fc.weight": (3, 5)})], {}), ff.LayoutError, r"fc.bias \[3\] only in fishers\[0\]"),
        (([f, f], {"backend": "warp"}), ff.BackendError, "unknown backend 'warp'; known are reference"),
    ]:
        before = f.buffer.clone()
        with pytest.raises(error, match=message):
            ff.merge_fishers(fishers, **options)
        assert torch.equal(f.buffer, before)


def test_merge_keeps_count_of_its_origin():
    merged = ff.merge_fishers([fisher(1), fisher(2)])
    assert merged.provenance == ff.Provenance("max of 2: batch", 14, 198)
    assert torch.equal(merged.buffer, torch.maximum(fisher(1).buffer, fisher(2).buffer))


def test_files_are_read_by_name_and_range(tmp_path):
    from fiun_fast import fisher_file

    shapes = {"scalar": (), "line": (17,), "cube": (5, 3, 4), "none": (0, 3)}
    f = ff.Fisher(torch.rand(1 + 17 + 60), ff.Layout(shapes))
    f.save(tmp_path / "f")
    generator = torch.Generator().manual_seed(0)
    with fisher_file.opened(tmp_path / "f") as file:
        assert file.layout == f.layout
        for name in shapes:
            whole = f[name].reshape(-1)
            assert torch.equal(file.read(name), whole)
            for _ in range(50):
                start, stop = sorted(torch.randint(whole.numel() + 1, (2,), generator=generator).tolist())
                assert torch.equal(file.read(name, start, stop), whole[start:stop]), (name, start, stop)
        with pytest.raises(ff.LayoutError, match="no parameter 'cubes'.*near names: cube"):
            file.read("cubes")
