"""Other trainers' configurations: nothing of them is lost, their defaults hold, and what comes out is a recipe that loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chaccu.conversation import list_formats
from chaccu.errors import RecipeError
from chaccu.train.foreign.command import find_training_command
from chaccu.train.foreign.headings import BEFORE, DEFAULTS, MEANINGLESS, TRANSLATED, UNSUPPORTED
from chaccu.train.foreign.trainers import DIALECTS, find_format
from chaccu.train.recipe import DataSource, LoraOptions, Recipe, RopeScaling, load_recipe
from chaccu.train.recipe_import import ImportedRecipe, import_recipe_file, import_recipe_text

VICUNA = r"""#!/bin/bash
# It's the script that trains on four GPUs.
MODEL=models/llama-7b
OUT="runs/of mine"
CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --nproc_per_node=4 --master_port=20001 fastchat/train/train_mem.py \
    --model_name_or_path $MODEL  \
    --data_path "shared/talks.json" \
    --bf16 True \
    # --fp16 True \
    --output_dir ${OUT}/vicuna \
    --num_train_epochs 3 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 2 \
    --gradient_accumulation_steps 16 \
    --evaluation_strategy "no" \
    --save_strategy "steps" --save_steps 1200 --save_total_limit 10 \
    --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --fsdp "full_shard auto_wrap" \
    --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --lazy_preprocess True 2>&1 | tee train.log
"""
QLORA = (
    "deepspeed --num_gpus 6 train_lora.py --model_name_or_path models/vicuna-7b --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 "
    "--data_path talks.json --output_dir out --fp16 True --q_lora True --deepspeed zero2.json"
)
AXOLOTL = """
base_model: models/llama-1b
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: someone/talks
    type: chat_template
    field_messages: conversations
    split: train
    roles_to_train: [assistant]
  - {path: json, data_files: [a.jsonl, b.jsonl], type: chat_template, train_on_eos: all}
chat_template: llama3
dataset_prepared_path: prepared
val_set_size: 0.1
output_dir: ./outputs/lora
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
wandb_api_key: SECRET
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
weight_decay: 0.0
special_tokens: {pad_token: "<|end_of_text|>"}
seed: 7
something_new: SECRET
"""
FACTORY = """
### model
model_name_or_path: models/llama-3
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity, alpaca_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3
logging_steps: 10
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.05
ddp_timeout: 180000000
"""
EXAMPLES = {"fastchat": VICUNA, "fastchat lora": QLORA, "axolotl": AXOLOTL, "llama-factory": FACTORY}


def from_flags(flags: str) -> ImportedRecipe:
    return import_recipe_text(f"--model_name_or_path m --data_path d.json --output_dir o {flags}", source="flags")


def from_axolotl(**keys: Any) -> ImportedRecipe:
    least = {"base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "d.jsonl", "type": "chat_template"}]}
    return import_recipe_text(yaml.safe_dump({**least, **keys}), source="a.yaml")


def from_factory(**keys: Any) -> ImportedRecipe:
    least = {"model_name_or_path": "m", "stage": "sft", "dataset": "talks"}
    return import_recipe_text(yaml.safe_dump({**least, **keys}), source="l.yaml")


def said(imported: ImportedRecipe, heading: str) -> str:
    return "\n".join(imported.remarks[heading])


# --- the four examples ---


def test_fastchat() -> None:
    imported = import_recipe_text(VICUNA, source="vicuna.sh")
    assert imported.trainer == "fastchat"
    assert imported.recipe == Recipe(
        model="models/llama-7b",
        data=[DataSource(path="shared/talks.json")],
        output="runs/of mine/vicuna",
        format="vicuna_v1.1",
        method="full",
        sequence_len=2048,
        micro_batch_tokens=4096,
        processes=4,
        global_batch_size=128,
        gradient_accumulation_steps=16,
        precision="bf16",
        num_train_epochs=3,
        activation_checkpointing="full",
        save_steps=1200,
        save_total_limit=10,
        seed=42,
    )
    assert "2 x 16 x 4 processes = 128 conversations of at most 2,048 tokens, so at most 262,144" in said(imported, BEFORE)
    assert "16 packed rows of 4,096 tokens on 4 processes = 262,144 tokens" in said(imported, BEFORE)
    assert "processes=1 takes the same steps, 262,144 tokens each" in said(imported, BEFORE)
    assert "nproc_per_node -> processes: 4" in said(imported, TRANSLATED)
    assert "chaccu data clean shared/talks.json --out runs/data --tokenizer models/llama-7b" in said(imported, BEFORE)
    assert "fsdp, fsdp_transformer_layer_cls_to_wrap: processes: 4 spreads weights" in said(imported, MEANINGLESS)
    assert "tf32: precision" in said(imported, MEANINGLESS)
    assert "master_port, CUDA_VISIBLE_DEVICES: of the launcher" in said(imported, MEANINGLESS)


def test_fastchat_with_lora() -> None:
    imported = import_recipe_text(QLORA, source="lora.sh")
    recipe = imported.recipe
    assert recipe.method == "qlora"
    assert recipe.lora == LoraOptions(rank=16, alpha=32, dropout=0.1, target_modules=["q_proj", "v_proj"])
    assert (recipe.precision, recipe.num_train_epochs, recipe.lr_scheduler, recipe.warmup_ratio) == ("auto", 3, "linear", 0.0)
    assert "6 processes" in said(imported, BEFORE)
    assert "deepspeed: processes: 6 spreads weights" in said(imported, MEANINGLESS)
    assert (recipe.processes, recipe.global_batch_size, recipe.gradient_accumulation_steps) == (6, 48, 1)
    assert "method: qlora (the keys lora_r, lora_alpha, lora_dropout, q_lora)" in said(imported, TRANSLATED)
    assert "lora_target_modules -> lora.target_modules: [q_proj, v_proj]" in said(imported, DEFAULTS)


def test_axolotl() -> None:
    imported = import_recipe_text(AXOLOTL, source="lora.yml", is_yaml=True)
    assert imported.recipe == Recipe(
        model="models/llama-1b",
        data=[DataSource(path="someone/talks"), DataSource(path="a.jsonl"), DataSource(path="b.jsonl")],
        output="./outputs/lora",
        format="llama-3",
        method="qlora",
        lora=LoraOptions(rank=16, alpha=32, dropout=0.05),
        sequence_len=4096,
        micro_batch_tokens=8192,
        gradient_accumulation_steps=2,
        learning_rate=2e-4,
        activation_checkpointing="full",
        seed=7,
    )
    assert "chaccu data clean hf:someone/talks a.jsonl b.jsonl" in said(imported, BEFORE)
    assert "--format llama-3 --validation-share 0.1" in said(imported, BEFORE)
    assert "4 rows of at most 4,096 tokens, so at most 16,384 tokens" in said(imported, BEFORE)
    assert "adapter -> method: qlora" in said(imported, TRANSLATED)
    assert "load_in_4bit -> method: qlora" in said(imported, TRANSLATED)
    for part in ("warmup_steps", "special_tokens", "something_new: not known", "train_on_eos"):
        assert part in said(imported, UNSUPPORTED)
    assert "load_in_8bit: switched off there" in said(imported, MEANINGLESS)
    assert "lora_model_dir, wandb_project: empty there" in said(imported, MEANINGLESS)
    assert "8 bits are for method full" in said(imported, TRANSLATED)
    assert "SECRET" not in imported.to_yaml()


def test_llama_factory() -> None:
    imported = import_recipe_text(FACTORY, source="sft.yaml", is_yaml=True)
    assert imported.recipe == Recipe(
        model="models/llama-3",
        data=[DataSource(path="identity", conversations=1000), DataSource(path="alpaca_demo", conversations=1000)],
        output="saves/llama3",
        format="llama-3",
        lora=LoraOptions(rank=8, alpha=16),
        gradient_accumulation_steps=8,
        learning_rate=1e-4,
        warmup_ratio=0.1,
        num_train_epochs=3,
        precision="bf16",
        activation_checkpointing="full",
        seed=42,
    )
    assert "data/dummy" not in imported.report()
    assert "data/dataset_info.json" in said(imported, BEFORE)
    assert "--validation-share 0.05" in said(imported, BEFORE)
    assert "lora_alpha -> lora.alpha: 16" in said(imported, DEFAULTS)


@pytest.mark.parametrize("text", EXAMPLES.values(), ids=list(EXAMPLES))
def test_what_is_written_loads_and_names_every_key(text: str, tmp_path: Path) -> None:
    imported = import_recipe_text(text, source="example")
    path = tmp_path / "recipe.yaml"
    path.write_text(imported.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == imported.recipe
    assert list(imported.fields) == [name for name in Recipe.__struct_fields__ if name in imported.fields]
    command = find_training_command(text)
    report = " ".join(imported.report().split())
    for key in command.flags if command else yaml.safe_load(text):
        assert key in report
    head = imported.to_yaml().partition("\nmodel:")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    assert [line.removeprefix("# ").removeprefix("#") for line in head.rstrip().splitlines()] == imported.report().splitlines()


# --- single keys ---


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--max_steps -1", {"max_steps": None}),
        ("--max_steps 500 --warmup_steps 50", {"max_steps": 500, "warmup_ratio": 0.1}),
        ("--warmup_steps 0", {"warmup_ratio": 0.0}),
        ("--warmup_steps 0 --warmup_ratio 0.2", {"warmup_ratio": 0.2}),
        ("--warmup_steps 0.1", {"warmup_ratio": 0.1}),
        ("--lr_scheduler_type constant --warmup_ratio 0.1", {"lr_scheduler": "constant", "warmup_ratio": 0.0}),
        ("--lr_scheduler_type constant_with_warmup --warmup_ratio 0.1", {"lr_scheduler": "constant", "warmup_ratio": 0.1}),
        ("--lr_scheduler_type polynomial", {"lr_scheduler": "cosine"}),
        ("--max_grad_norm 0", {"max_grad_norm": 1e9}),
        ("--num_train_epochs 1.5", {"num_train_epochs": 2}),
        ("--optim adamw_bnb_8bit", {"method": "full", "optimizer": "adamw_8bit"}),
        ("--optim adamw_bnb_8bit --lora_r 8", {"method": "lora", "optimizer": "adamw"}),
        ("--optim adamw_torch_fused", {"optimizer": "adamw"}),
        ("--optim adamw_torch_4bit", {"method": "full", "optimizer": "adamw_8bit"}),
        ("--optim adafactor", {"method": "full", "optimizer": "adafactor"}),
        ("--optim adafactor --lora_r 8", {"method": "lora", "optimizer": "adafactor"}),
        ("--optim lion_32bit", {"optimizer": "adamw"}),
        ("--per_device_train_batch_size 1", {"micro_batch_tokens": None}),
        ("--bf16", {"precision": "bf16"}),
        ("--fp16 True", {"precision": "auto"}),
        ("", {"precision": "fp32", "learning_rate": 5e-5, "sequence_len": 512, "micro_batch_tokens": 4096}),
        ("--torch_compile True", {"compile": True}),
        ("--gradient-checkpointing=False", {"activation_checkpointing": "none"}),
        ("--eval_data_path held.json --eval_strategy steps --eval_steps 50", {"eval_steps": 50, "report_to": "tensorboard"}),
        ("--eval_steps 50", {"eval_steps": None}),
        ("--save_strategy no --save_steps 10", {"save_steps": None}),
        ("--save_steps 10 --save_total_limit 3", {"save_steps": 10, "save_total_limit": 3}),
        ("--save_steps 10 --save_total_limit 0", {"save_steps": 10, "save_total_limit": 2}),
        ("--report_to wandb", {"report_to": "wandb"}),
        ("--report_to tensorboard wandb", {"report_to": "wandb"}),
        ("--report_to none", {"report_to": "none"}),
        ("--report_to mlflow", {"report_to": "tensorboard"}),
        ("--eval_data_path held.json", {"validation": [DataSource(path="held.json")]}),
    ],
)
def test_a_flag_gives_a_value(flags: str, expected: dict[str, Any]) -> None:
    recipe = from_flags(flags).recipe
    assert {key: getattr(recipe, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--lr_scheduler_type polynomial", "lr_scheduler_type: polynomial"),
        ("--num_train_epochs 1.5", "num_train_epochs: epochs are whole"),
        ("--optim lion_32bit", "optim: lion_32bit"),
        ("--warmup_steps 100", "Set warmup_ratio to 100 by the steps"),
        ("--optim adafactor --optim_args x=1", "optim_args: AdamW runs with betas"),
        ("--adam_beta2 0.95", "adam_beta2: AdamW runs with 0.999"),
        ("--neftune_noise_alpha 5", "neftune_noise_alpha"),
        ("--save_strategy epoch", "save_strategy: epoch is not there; save_steps counts steps"),
        ("--save_steps 0.1", "save_steps: a share of the run"),
        ("--report_to mlflow", "report_to: one of tensorboard, wandb and trackio"),
        ("--report_to wandb,tensorboard,comet_ml", "report_to: one of"),
        ("--resume_from_checkpoint out/checkpoint-5", "resume_from_checkpoint"),
        ("--anything_else 3", "anything_else: not known"),
        ("-x lonely", "-x lonely: these words belong to no flag"),
    ],
)
def test_what_is_not_there_is_named(flags: str, named: str) -> None:
    assert named in said(from_flags(flags), UNSUPPORTED)


def test_what_is_the_same_or_off_there_is_no_loss() -> None:
    imported = from_flags(
        "--adam_beta2 0.999 --neftune_noise_alpha 0 --label_smoothing_factor 0.0 --fsdp '' --push_to_hub False"
    )
    assert imported.remarks[UNSUPPORTED] == []
    assert "adam_beta2: 0.999 here too" in said(imported, MEANINGLESS)
    assert "neftune_noise_alpha, label_smoothing_factor, fsdp, push_to_hub: switched off there" in said(imported, MEANINGLESS)


@pytest.mark.parametrize(
    ("keys", "targets"),
    [
        ({"lora_target_modules": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        ({"lora_target_modules": "q_proj"}, ["q_proj"]),
        ({"lora_target_modules": r"model\.layers\.[0-9]\..*_proj"}, r"model\.layers\.[0-9]\..*_proj"),
        ({"lora_target_modules": ["q_proj", "lm_head"]}, ["q_proj"]),
        ({"lora_target_linear": True, "lora_target_modules": ["q_proj"]}, "all-linear"),
        ({"lora_target_linear": False}, ["q_proj", "v_proj"]),
    ],
)
def test_axolotl_targets(keys: dict[str, Any], targets: Any) -> None:
    assert from_axolotl(adapter="lora", lora_r=8, lora_alpha=16, **keys).recipe.lora.target_modules == targets


def test_axolotl_without_an_adapter_is_full_training() -> None:
    imported = from_axolotl(lora_r=8, bf16=False, batch_size=32, micro_batch_size=4, optimizer="adamw_bnb_8bit")
    recipe = imported.recipe
    assert (recipe.method, recipe.precision, recipe.gradient_accumulation_steps, recipe.optimizer) == (
        "full",
        "fp32",
        8,
        "adamw_8bit",
    )
    assert "lora_r: the method is full" in said(imported, MEANINGLESS)


def test_weights_in_nothing_but_bf16_stay_so() -> None:
    full = from_factory(finetuning_type="full", pure_bf16=True)
    assert (full.recipe.precision, full.recipe.optimizer) == ("bf16", "adamw_bf16_sr")
    assert "pure_bf16 -> optimizer: adamw_bf16_sr (in place of adamw" in said(full, TRANSLATED)
    assert from_axolotl(bf16="full").recipe.optimizer == "adamw_bf16_sr"
    assert from_axolotl(bf16="full", optimizer="adamw_bnb_8bit").recipe.optimizer == "adamw_8bit"
    assert from_axolotl(bf16="full", optimizer="adafactor").recipe.optimizer == "adafactor"
    assert from_axolotl(bf16=True).recipe.optimizer == "adamw"
    assert from_factory(pure_bf16=True).recipe.optimizer == "adamw"


def test_the_scale_of_rslora_is_given() -> None:
    imported = from_axolotl(adapter="lora", lora_r=16, lora_alpha=32, peft_use_rslora=True)
    assert "lora.alpha=128" in said(imported, UNSUPPORTED)


def test_evaluations_wait_for_held_out_data() -> None:
    assert "eval_steps=50 evaluates as often" in said(from_flags("--eval_steps 50"), BEFORE)
    assert "evaluation_strategy, eval_steps: switched off" in said(
        from_flags("--evaluation_strategy no --eval_steps 5"), MEANINGLESS
    )


def test_axolotl_names_trackers_by_their_projects() -> None:
    assert from_axolotl(wandb_project="mine").recipe.report_to == "wandb"
    assert from_axolotl(use_tensorboard=True).recipe.report_to == "tensorboard"
    assert "mlflow_project: one of" in said(from_axolotl(mlflow_project="mine"), UNSUPPORTED)


def test_shards_of_one_process_are_named() -> None:
    imported = from_axolotl(deepspeed="zero3.json", fsdp=[], micro_batch_size=2, gradient_accumulation_steps=4)
    assert "deepspeed: one process shards nothing. With processes: N" in said(imported, UNSUPPORTED)
    assert "fsdp: switched off there" in said(imported, MEANINGLESS)
    assert "processes=N takes N times as many tokens in a step" in said(imported, BEFORE)
    assert (imported.recipe.processes, imported.recipe.global_batch_size) == (1, None)
    alone = import_recipe_text("torchrun --nproc_per_node 1 t.py --model_name_or_path m --data_path d", source="s").recipe
    assert (alone.processes, alone.global_batch_size, alone.gradient_accumulation_steps) == (1, None, 1)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, RopeScaling(rope_type="linear", factor=2.0)),
        (
            {"overrides_of_model_config": {"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 16}}},
            RopeScaling(rope_type="yarn", factor=4.0, beta_fast=16.0),
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": "2", "original_max_position_embeddings": 4096.0, "odd": 1}},
            RopeScaling(rope_type="dynamic", factor=2.0, original_max_position_embeddings=4096),
        ),
    ],
)
def test_stretched_positions_are_carried_over(keys: dict[str, Any], expected: RopeScaling) -> None:
    imported = from_axolotl(**keys)
    assert imported.recipe.rope_scaling == expected
    assert "rope_scaling -> rope_scaling: {" in said(imported, TRANSLATED)
    assert ("odd has no like" in said(imported, UNSUPPORTED)) == ("odd" in str(keys))


def test_other_ways_of_stretching_are_told() -> None:
    assert "rope_scaling: linear takes its factor" in said(from_factory(rope_scaling="linear"), BEFORE)
    assert "linear, dynamic, yarn and llama3 are known" in said(from_factory(rope_scaling="mystic"), UNSUPPORTED)
    assert "none that is known here" in said(from_axolotl(rope_scaling={"type": "su", "factor": 2}), UNSUPPORTED)
    assert "none that is known here" in said(from_axolotl(rope_scaling={"factor": 2}), UNSUPPORTED)
    assert "use_rope_scaling: switched off there" in said(from_factory(use_rope_scaling=False), MEANINGLESS)
    assert "rope_scaling: switched off there" in said(from_factory(rope_scaling="none"), MEANINGLESS)
    long = "python train_mem.py --model_name_or_path m --data_path d --model_max_length 16384"
    assert "FastChat stretches positions linearly" in said(import_recipe_text(long, source="s"), BEFORE)


def test_float8_is_carried_over_where_the_rest_goes_with_it() -> None:
    imported = from_axolotl(fp8=True, torch_compile=True, bf16=True)
    assert (imported.recipe.precision, imported.recipe.method) == ("fp8", "full")
    assert "bf16: fp8 stands before it" in said(imported, MEANINGLESS)
    assert from_axolotl(fp8=True, bf16=True).recipe.precision == "bf16"
    assert "fp8: precision fp8 goes with" in said(from_axolotl(fp8=True, bf16=True), UNSUPPORTED)


def test_llama_factory_recomputes_unless_told_not_to() -> None:
    assert from_factory().recipe.activation_checkpointing == "full"
    assert from_factory(disable_gradient_checkpointing=True).recipe.activation_checkpointing == "none"
    assert from_factory(finetuning_type="full").recipe.method == "full"
    assert "finetuning_type: freeze" in said(from_factory(finetuning_type="freeze"), UNSUPPORTED)


# --- formats ---


@pytest.mark.parametrize(
    ("trainer", "template", "name"),
    [
        ("llama-factory", "vicuna", "vicuna_v1.1"),
        ("llama-factory", "llama3", "llama-3"),
        ("llama-factory", "chatml", "chatml"),
        ("llama-factory", "qwen", "qwen"),
        ("llama-factory", "gemma", "gemma-3"),
        ("llama-factory", "falcon", None),
        ("llama-factory", "qwen3", None),
        ("axolotl", "gemma", "gemma"),
        ("axolotl", "qwen_25", "qwen2.5"),
        ("axolotl", "tokenizer_default", "tokenizer"),
        ("axolotl", "tokenizer_default_fallback_chatml", "tokenizer"),
        ("axolotl", "jinja", None),
        ("axolotl", "vicuna_v1.1", "vicuna_v1.1"),
        ("axolotl", "ChatML", "chatml"),
    ],
)
def test_a_template_stands_for_a_format(trainer: str, template: str, name: str | None) -> None:
    assert find_format(trainer, template)[0] == name


@pytest.mark.parametrize("trainer", DIALECTS)
def test_templates_stand_for_formats_that_there_are(trainer: str) -> None:
    tables = yaml.safe_load((Path(find_training_command.__code__.co_filename).parent / "keys.yaml").read_text())
    for template in {**tables["formats"]["any"], **tables["formats"].get(trainer, {})}:
        name, note = find_format(trainer, template)
        assert name in {*list_formats(), "tokenizer"} or (name is None and note)


def test_an_unknown_template_leaves_the_format_open() -> None:
    imported = from_factory(template="lama-3")
    assert imported.recipe.format is None
    assert "template: lama-3: no format stands for it; llama-3" in said(imported, UNSUPPORTED)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"datasets": [{"path": "d", "type": "sharegpt", "conversation": "chatml"}]}, "chatml"),
        ({"datasets": [{"path": "d", "type": "sharegpt"}]}, "vicuna_v1.1"),
        ({"datasets": [{"path": "d", "type": "alpaca_chat.load_qa"}]}, "alpaca"),
        ({"datasets": [{"path": "d", "type": "chat_template"}]}, "tokenizer"),
        ({"datasets": [{"path": "d", "type": "chat_template", "chat_template": "gemma"}], "chat_template": "chatml"}, "gemma"),
        ({"datasets": [{"path": "d", "type": "oasst"}]}, None),
        (
            {"datasets": [{"path": "d", "type": "alpaca"}, {"path": "e", "type": "chat_template"}], "chat_template": "chatml"},
            "chatml",
        ),
    ],
)
def test_axolotl_s_data_sets_say_the_format(keys: dict[str, Any], name: str | None) -> None:
    imported = from_axolotl(**keys)
    assert imported.recipe.format == name
    assert (name is None) == ("format: neither" in said(imported, UNSUPPORTED))


def test_another_script_does_not_say_the_format() -> None:
    imported = import_recipe_text("python sft.py --model_name_or_path m --dataset_name d --output_dir o", source="s")
    assert imported.recipe.format is None
    assert "sft.py does not say" in said(imported, BEFORE)


# --- scripts ---


def test_variables_substitutions_comments_and_redirections() -> None:
    command = find_training_command(
        "export BASE=models\n"
        "EXTRA='--seed 5 --tf32 True'\n"
        "GPUS=$(nvidia-smi -L | wc -l) # it's counted; here\n"
        'echo "begin; now"\n'
        "torchrun --nnodes 2 --nproc_per_node 8 -m fastchat.train.train_lora --model_name_or_path $BASE/x#1 \\\r\n"
        "  --data-path=${DATA:-talks.json} --run_name 'of #3; a & b' --output_dir out/$(date +%s) $EXTRA \\\n"
        "  --seed 6 --flag > log.txt 2>&1 && echo done --data_path\n"
    )
    assert command is not None
    assert command.flags == {
        "model_name_or_path": "models/x#1",
        "data_path": "talks.json",
        "run_name": "of #3; a & b",
        "output_dir": "out/$(date +%s)",
        "seed": "6",
        "tf32": "True",
        "flag": True,
    }
    assert (command.script, command.processes, command.repeated) == ("fastchat.train.train_lora", 16, ["seed"])


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("python train.py", None),
        ("torchrun --nproc_per_node gpu train.py", None),
        ("torchrun --nproc_per_node=$N train.py", None),
        ("python -m torch.distributed.run --nproc_per_node=2 train.py", 2),
        ("accelerate launch --num_processes 8 --num_machines 2 train.py", 8),
        ("deepspeed --num_gpus 6 --num_nodes 2 train.py", 12),
        ("--nproc_per_node 3", 3),
    ],
)
def test_processes(launcher: str, processes: int | None) -> None:
    command = find_training_command(f"{launcher} --model_name_or_path m --output_dir o")
    assert command is not None
    assert (command.processes, command.flags) == (processes, {"model_name_or_path": "m", "output_dir": "o"})


def test_the_home_folder_is_put_in_and_a_later_quote_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    command = find_training_command("python train.py --model_name_or_path ~/llama --output_dir ~other\necho 'it is\n")
    assert command is not None
    assert command.flags == {"model_name_or_path": "/home/someone/llama", "output_dir": "~other"}


def test_a_variable_that_is_not_set_is_told() -> None:
    imported = import_recipe_text("python train.py --model_name_or_path $M --data_path $D --output_dir o", source="s")
    assert (imported.recipe.model, imported.recipe.data[0].path) == ("$M", "$D")
    assert "model holds a variable" in said(imported, BEFORE)
    assert "data holds a variable" in said(imported, BEFORE)


def test_what_is_given_twice_and_other_commands_are_told() -> None:
    imported = import_recipe_text(f"{QLORA} --seed 1 --seed 2\n{QLORA}\n", source="s")
    assert imported.recipe.seed == 2
    assert "seed is given more than once" in said(imported, BEFORE)
    assert "trains 1 times more" in said(imported, BEFORE)
    imported = import_recipe_text(AXOLOTL + "seed: 8\n", source="a.yaml")
    assert imported.recipe.seed == 8
    assert "seed is given more than once" in said(imported, BEFORE)


def test_the_trainer_s_arguments_as_json_and_llama_factory_s_as_flags(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "data_path": "d", "output_dir": "o", "bf16": True}))
    assert import_recipe_file(path).trainer == "fastchat"
    flags = "llamafactory-cli train --stage sft --model_name_or_path m --dataset a,b --template qwen --output_dir o"
    imported = import_recipe_text(flags, source="s")
    assert (imported.trainer, imported.recipe.format, len(imported.recipe.data)) == ("llama-factory", "qwen", 2)


# --- wrong input ---


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "base_model: [", "a.yaml is not YAML"),
        ("a.yaml", "- one\n- two\n", "neither YAML with a trainer's keys nor a command"),
        ("a.yaml", "rank: 3\nweights: x\n", "keys of no trainer"),
        ("a.yaml", "model: x\ndata: [{path: y}]\noutput: z\n", "recipe of Chaccu's already"),
        ("a.yaml", "base_model: x\ndatasets: [{path: y}]\n", "has no learning_rate"),
        ("a.yaml", "base_model: x\nlearning_rate: 1e-4\n", "names no data"),
        ("a.yaml", "base_model: x\nlearning_rate: 1e-4\ndatasets: talks.json\n", "datasets is no list"),
        ("a.yaml", "base_model: x\nlearning_rate: 1e-4\ndatasets: [{type: alpaca}]\n", "has no path"),
        ("a.yaml", "base_model: x\nrl: dpo\n", "has rl"),
        ("a.yaml", "model_name_or_path: x\nstage: dpo\n", "stage is 'dpo'"),
        ("a.yaml", "model_name_or_path: x\nstage: sft\ndataset: d\ncutoff_len: 0\n", "sequence_len is 0"),
        (
            "a.yaml",
            "model_name_or_path: x\nstage: sft\ndataset: d\nlearning_rate: fast\n",
            "learning_rate is 'fast', where a number",
        ),
        ("a.sh", "echo hello\n", "neither YAML with a trainer's keys nor a command"),
        ("a.sh", "python train.py --model_name_or_path 'x\n", "a quote does not end"),
        ("a.sh", "python train.py --model_name_or_path x --output_dir o\n", "names no data"),
        ("a.sh", "python train.py --data_path x --output_dir o\n", "keys of no trainer"),
        (
            "a.sh",
            "python train.py --model_name_or_path m --data_path d --seed $S\n",
            r"seed is '\$S', where a number is wanted",
        ),
        ("a.sh", "python train.py --model_name_or_path m --data_path d --bf16 maybe\n", "bf16 is 'maybe', where true or false"),
        ("a.sh", "python train.py --model_name_or_path m --data_path d --learning_rate\n", "learning_rate is True"),
    ],
)
def test_wrong_input_is_named_with_a_remedy(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        import_recipe_file(path)
    assert caught.value.remedy or name == "a.yaml"


def test_no_such_file_no_text_no_such_trainer(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no file"):
        import_recipe_file(tmp_path / "absent.sh")
    path = tmp_path / "model.bin"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="is not text"):
        import_recipe_file(path)
    with pytest.raises(RecipeError, match="no import from 'axolot'") as caught:
        import_recipe_text(AXOLOTL, source="a", trainer="axolot")
    assert "'axolotl'" in caught.value.remedy
    with pytest.raises(RecipeError, match="has no base_model"):
        import_recipe_text(FACTORY, source="a", trainer="axolotl")


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_refused_or_gives_a_recipe(text: str) -> None:
    command = f"python train.py --model_name_or_path m --data_path d --output_dir o {text}"
    for one in (text, command, f"{AXOLOTL}\n{text}"):
        try:
            imported = import_recipe_text(one, source="text")
        except RecipeError:
            continue
        assert load_fields(imported.to_yaml()) == msgspec.to_builtins(imported.recipe)


def load_fields(text: str) -> Any:
    from chaccu.train.recipe import parse_recipe

    return msgspec.to_builtins(parse_recipe(yaml.safe_load(text)))


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*yaml.safe_load(AXOLOTL), *yaml.safe_load(FACTORY)]), st.none() | st.integers() | st.text()
    )
)
@example({"chat_template": 0})
@example({"chat_template": ""})
@example({"gradient_accumulation_steps": 0})
def test_any_values_are_refused_or_give_a_recipe(values: dict[str, Any]) -> None:
    for text in (AXOLOTL, FACTORY):
        try:
            imported = import_recipe_text(yaml.safe_dump({**yaml.safe_load(text), **values}), source="text", is_yaml=True)
        except RecipeError:
            continue
        report = " ".join(imported.report().split())
        assert all(key in report for key in values)
        assert load_fields(imported.to_yaml()) == msgspec.to_builtins(imported.recipe)


def test_it_starts_without_torch() -> None:
    code = "import sys, chaccu.train.recipe_import; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_base_in_4_bits_is_qlora_and_every_key_about_it_is_answered() -> None:
    imported = from_factory(
        finetuning_type="lora",
        quantization_bit=4,
        quantization_method="bnb",
        quantization_type="fp4",
        double_quantization=False,
    )
    assert imported.recipe.method == "qlora"
    assert "quantization_bit -> method: qlora" in said(imported, TRANSLATED)
    assert "quantization_method: the base is packed" in said(imported, MEANINGLESS)
    for key in ("quantization_type", "double_quantization"):
        assert key in said(imported, UNSUPPORTED)
    eight = from_factory(finetuning_type="lora", quantization_bit=8)
    assert eight.recipe.method == "lora"
    assert "quantization_bit: the base stays" in said(eight, UNSUPPORTED)
    full = from_factory(finetuning_type="full", quantization_bit=4)
    assert full.recipe.method == "full"
    assert "quantization_bit" in said(full, UNSUPPORTED)
