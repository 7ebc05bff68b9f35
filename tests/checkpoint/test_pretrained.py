def drop(tensors: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors.items() if name not in names}


def break_missing(path: Path) -> None:
    rewrite(path, lambda t: drop(t, "model.norm.weight"))


def break_shape(path: Path) -> None:
    rewrite(path, lambda t: t | {"model.norm.weight": torch.ones(31)})


def break_truncate(path: Path) -> None:
    os.truncate(path / SINGLE_FILE, 5000)


def break_index(path: Path) -> None:
    (path / SINGLE_FILE).unlink()
    (path / INDEX_FILE).write_text("{")


def break_index_file(path: Path) -> None:
    (path / SINGLE_FILE).unlink()
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


def break_index_escape(path: Path) -> None:
    (path / SINGLE_FILE).rename(path.parent / "elsewhere")
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))


def break_index_tensor(path: Path) -> None:
    (path / SINGLE_FILE).rename(path / "model-1.safetensors")
    names = [*load_file(path / "model-1.safetensors"), "ghost"]
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))


def break_weights(path: Path) -> None:
    (path / SINGLE_FILE).rename(path / "pytorch_model.bin")


def break_config(path: Path) -> None:
    (path / "config.json").write_text("{")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (break_missing, "no tensor in the checkpoint fills 'model.norm.weight'"),
    "another shape": (break_shape, r"'model.norm.weight': expected shape \[32\] as config.json says, got \[31\]"),
    "truncated": (break_truncate, r"model.safetensors: truncated"),
    "broken index": (break_index, f"{INDEX_FILE}: expected JSON"),
    "no such shard": (break_index_file, "names this file, but it is not there"),
    "file elsewhere": (break_index_escape, "expected names of files in the same directory"),
    "not in the shard": (break_index_tensor, "expected tensor 'ghost'"),
    "no archive": (break_weights, "pytorch_model.bin: expected an archive that torch.save wrote"),
    "no config": (lambda path: (path / "config.json").unlink(), "expected a checkpoint with a config.json"),
    "broken config": (break_config, "config.json: (expected JSON|not a configuration)"),
    "unknown type": (lambda path: edit_config(path, model_type="nemo_17"), "not a configuration"),
    "quantized": (
        lambda path: edit_config(path, quantization_config={"quant_method": "fp8"}), "quantized weights",
    ),
    "nothing at all": (shutil.rmtree, "no directory of that name"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model"
    make("llama", path)
    damage, message = BROKEN[case]
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_not_allocated(tmp_path: Path) -> None:
    """20 GB of parameters that no tensor fills are named, not filled with random values."""
    make("llama", tmp_path)
    rewrite(tmp_path, lambda t: {"model.norm.weight": t["model.norm.weight"]})
    edit_config(tmp_path, vocab_size=80_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"no tensor in the checkpoint fills 'lm_head.weight' and 19 more"):
        open_checkpoint(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
