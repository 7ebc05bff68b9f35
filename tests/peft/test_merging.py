"""Merged checkpoints have the bits of peft's `merge_and_unload`, whatever the adapter is on."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from checkpoint_models import stored
from hf_cases import make_model
from same_bits import assert_same_tensors
from tiny_peft import CONFIGS, WITH_DTYPE, adapted, base_for

import distzo2
from distzo2.errors import DistZO2Error
from distzo2.peft.merging import check_merges


@pytest.mark.parametrize(("name", "dtype"), [case for case in WITH_DTYPE if not CONFIGS[case[0]].is_prompt_learning])
def test_merged(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base_for(name).to(dtype).save_pretrained(tmp_path / "base")
    adapted(name).save_pretrained(tmp_path / "adapter")
    distzo2.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base_for(name).to(dtype), tmp_path / "adapter").merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    with pytest.raises(DistZO2Error, match="already holds"):
        distzo2.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")


def test_what_does_not_merge(tmp_path: Path) -> None:
    adapted("prefix").save_pretrained(tmp_path / "adapter")
    with pytest.raises(DistZO2Error, match="a prompt or prefix cannot be merged into weights"):
        distzo2.merge_adapter(tmp_path, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("fields", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("tied", [True, False])
def test_what_two_modules_share_does_not_merge(fields: dict, tied: bool) -> None:
    base = make_model(tie_word_embeddings=tied)
    names = {id(p): name for name, p in base.named_parameters()}
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**{"target_modules": ["q_proj"]} | fields))
    with pytest.raises(DistZO2Error, match=r"embed_tokens\.weight, which another") if tied else nullcontext():
        check_merges(wrapped, names)
