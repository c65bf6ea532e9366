"""Sixty more mistakes: files that are another's, torn or odd (below ``HERE``), and options of other programs.

As in :mod:`tests.cli.mistakes`; all are answered before torch is imported, but those of :data:`FULL`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_RECIPE: Final = "model_name: pythia-14m\ndata: StateOfTheUnion\n"
FILES: Final[dict[str, str | bytes]] = {
    "tab.yaml": "model_name: pythia-14m\ntrain:\n\tmax_steps: 3\n",
    "unclosed.yaml": f"{_RECIPE}train: {{max_steps: 3\n",
    "list.yaml": "- model_name: pythia-14m\n",
    "binary.yaml": bytes(range(256)),
    "utf16.yaml": _RECIPE.encode("utf-16"),
    "lightning_cli.yaml": "seed_everything: 42\ntrainer: {max_steps: 10}\nmodel: {class_path: my.Model}\n",
    "config.json": '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}',
    "words.yaml": f"{_RECIPE}train: {{max_steps: 10 steps}}\n",
    "comma.yaml": f"{_RECIPE}optimizer: {{class_path: AdamW, init_args: {{weight_decay: '0,01'}}}}\n",
    "mapping.yaml": f"{_RECIPE}callbacks: {{SpectralRankCallback: {{every_n_steps: 5}}}}\n",
    "flat.yaml": f"{_RECIPE}callbacks: [{{class_path: TailTokenProbe, every_n_steps: 5}}]\n",
    "hydra.yaml": f"{_RECIPE}optimizer: {{_target_: torch.optim.AdamW, lr: 1e-3}}\n",
    "params.yaml": f"{_RECIPE}optimizer: {{class_path: AdamW, params: {{lr: 1e-3}}}}\n",
    "variable.yaml": "model_name: pythia-14m\ndata: ${DATA}\n",
    "itself.yaml": "base: HERE/itself.yaml\n",
    "no_base.yaml": "base: quikstart\n",
    "one_value.yaml": "base: debug\nsweep: {axes: {seed: 3}}\n",
    "no_axes.yaml": "base: debug\nsweep: {seed: [0, 1]}\n",
    "axis.yaml": "base: debug\nsweep: {axis: {seed: [0, 1]}}\n",
    "no_head.csv": "a,64,1\na,128,2\na,256,3\n",
    "words.csv": "optimizer,width,value\na,small,1\na,base,2\na,large,3\n",
    "twice.csv": "optimizer,width,width,value\na,64,64,1\n",
    "empty.csv": "",
    "head.csv": "optimizer,width,value\n",
    "other_names.csv": "optimizer,d_ff,hard_rank\na,64,1\na,128,2\n",
    "table.xlsx": b"PK\x03\x04abc",
    "points.json": '{"a": 1}',
    "no_json/run.json": "{not json",
    "a_list/run.json": "[]",
    "no_records/spectral.jsonl": "",
    "of_others/spectral.jsonl": '{"foo": 1}\n',
    "torn/lit_model.pth": b"not a checkpoint",
    "torn/model_config.yaml": "name: x\n",
}


def write(folder: Path, run_json: str) -> None:
    """The files; ``run_json`` for the run folders that need a whole one."""
    for name, content in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content.replace("HERE", str(folder)))
        if file.name == "run.json":
            (file.parent / "spectral.jsonl").write_text("")
        if file.name == "spectral.jsonl":
            (file.parent / "run.json").write_text(run_json)


RECIPES: Final = [
    ("pretrain --config HERE/tab.yaml", ["HERE/tab.yaml", "line 3", "tab", "spaces"]),
    ("pretrain --config HERE/unclosed.yaml", ["HERE/unclosed.yaml", "line 3", "closing `}`"]),
    ("pretrain --config HERE/list.yaml", ["HERE/list.yaml", "list", "keys and values"]),
    ("pretrain --config HERE/binary.yaml", ["HERE/binary.yaml", "byte 129", "UTF-8"]),
    ("pretrain --config HERE/utf16.yaml", ["HERE/utf16.yaml", "byte 1 ", "Save it as UTF-8"]),
    ("pretrain --config HERE/lightning_cli.yaml", ["`trainer`", "LightningCLI", "--print_config"]),
    ("pretrain --config HERE/config.json", ["`model_type`", "Hugging Face", "`--model_name`"]),
    ("pretrain --config HERE/words.yaml", ["`train.max_steps`", "10 steps", "int"]),
    ("pretrain --config HERE/comma.yaml", ["`optimizer.init_args.weight_decay`", "0,01", "float"]),
    ("pretrain --config HERE/mapping.yaml", ["`callbacks`", "list", "--callbacks+"]),
    ("pretrain --config HERE/flat.yaml", ["`callbacks.TailTokenProbe.init_args.every_n_steps`"]),
    ("pretrain --config HERE/hydra.yaml", ["`optimizer`", "_target_", "`class_path`"]),
    ("pretrain --config HERE/params.yaml", ["`optimizer.params`", "AdamW", "`init_args`"]),
    ("pretrain --config HERE/variable.yaml", ["`data`", "`${DATA}`", "--data"]),
    ("pretrain --config HERE/itself.yaml", ["`base:", "names that file itself", "another recipe"]),
    ("pretrain --config HERE/no_base.yaml", ["`quikstart`", "`quickstart`"]),
    ("sweep HERE/one_value.yaml --dry-run", ["`seed`", "3", "list of values"]),
    ("sweep HERE/no_axes.yaml --dry-run", ["`sweep:`", "`seed`", "`axes: {seed: [a, b]}`"]),
    ("sweep HERE/axis.yaml --dry-run", ["`sweep:`", "`axis`", "`axes`"]),
]

WORDS: Final = [
    ("pretrain --config RECIPE --train {max_steps:", ["`--train`", "`{max_steps:`", "closing `}`", "quotes"]),
    ("pretrain --config RECIPE --train '{max_steps: 3'", ["`--train`", "`{max_steps: 3`", "closing `}`", "quotes"]),
    (
        "pretrain --config RECIPE --optimizer.init_args.betas [0.9,",
        ["`--optimizer.init_args.betas`", "`[0.9,`", "closing `]`", "quotes"],
    ),
    (
        "pretrain --config RECIPE --optimizer.init_args.betas [0.9, 0.95]",
        ["`--optimizer.init_args.betas`", "`[0.9,`", "`0.95]`", "quotes"],
    ),
    (
        "pretrain --config RECIPE --callbacks+ '{class_path: TailTokenProbe'",
        ["`--callbacks+`", "`{class_path: TailTokenProbe`", "closing `}`"],
    ),
    ("pretrain --help_keys max_stepz", ["--help_keys max_stepz", "`max_steps`"]),
    ("pretrain --config RECIPE --train.max_steps=", ["`--train.max_steps=`", "no value", "null"]),
    ("pretrain --config RECIPE --train.max_steps inf", ["`train.max_steps`", "inf", "int"]),
    ("pretrain --config RECIPE --train.max_steps 10k", ["`train.max_steps`", "10k", "int"]),
    ("pretrain --config RECIPE --optimizer.init_args.lr nan", ["`optimizer.init_args.lr`", "nan", "float"]),
    (
        "pretrain --config RECIPE --optimizer.init_args.betas '(0.9, 0.95)'",
        ["`optimizer.init_args.betas`", "(0.9, 0.95)", "write [0.9, 0.95]"],
    ),
    ("pretrain --config RECIPE --gpus 2", ["`gpus`", "`devices`"]),
    ("pretrain --config RECIPE --wandb true", ["`wandb`", "`logger_name`"]),
    ("pretrain --config RECIPE --gradient_clip_val 1", ["`gradient_clip_val`", "`train.max_norm`"]),
    (
        "pretrain --config RECIPE --accumulate_grad_batches 2",
        ["`accumulate_grad_batches`", "`train.global_batch_size`"],
    ),
    ("pretrain --config RECIPE --warmup_steps 5", ["`warmup_steps`", "`train.lr_warmup_steps`"]),
    ("pretrain --config RECIPE --hidden_size 64", ["`hidden_size`", "`model_config.n_embd`"]),
    ("pretrain --config RECIPE --device cuda", ["`device`", "`accelerator`"]),
    ("pretrain --config RECIPE --data wikitext", ["`data`", "`wikitext`", "HubText"]),
    ("pretrain --config RECIPE -c debug", ["`-c`", "`--config"]),
    ("sweep RECIPE --where seed=0", ["`--where`", "fit", "`--axis seed=0`"]),
    ("sweep debug --seeds 0,1", ["`--seeds`", "`--axis seed=0,1,2`"]),
    ("sweep debug --axis seed=0,1 --jobs 2", ["`--jobs`", "`--workers`"]),
    ("sweep debug --axis seed=[0,1,2] --dry-run", ["`seed=[0,1,2]`", "`seed=0,1,2`"]),
    ("sweep debug --axis seed=0,1 --out FILE --dry-run", ["`--out FILE`", "file", "folder"]),
    ("measure EMPTY --data TEXT --dtype bf16", ["`--dtype`", "fp32"]),
    ("measure pythia-14m --text hello", ["`--text`", "file", "`--data my.txt`"]),
    ("measure RUNS --data TEXT", ["RUNS", "`lit_model.pth`", "`config.json`"]),
    ("measure FILE --data TEXT", ["FILE", "no checkpoint", "`.ckpt`"]),
    ("measure EMPTY --data TEXT --context 5", ["`--context`", "`--seq_length`"]),
    ("measure HERE/torn --data TEXT", ["HERE/torn/lit_model.pth", "incomplete or corrupted"]),
    ("inspect nowhere.py", ["`nowhere.py`", "path"]),
    ("inspect FILE", ["FILE", "no model", "`train.py:Net`"]),
    ("inspect torch.nn:Linear", ["`torch.nn:Linear`", "`torch.nn.Linear`"]),
]

TABLES: Final = [
    ("fit HERE/no_head.csv", ["HERE/no_head.csv", "`width`", "64", "names of its columns"]),
    ("fit HERE/words.csv", ["HERE/words.csv", "`small`", "`width`", "number"]),
    ("fit HERE/twice.csv", ["HERE/twice.csv", "`width`", "Rename"]),
    ("fit HERE/empty.csv", ["HERE/empty.csv", "empty"]),
    ("fit HERE/head.csv", ["HERE/head.csv", "`width`", "row"]),
    ("fit HERE/other_names.csv", ["HERE/other_names.csv", "`value`", "--y", "hard_rank"]),
    ("fit HERE/table.xlsx", ["HERE/table.xlsx", ".csv"]),
    ("fit HERE/points.json", ["HERE/points.json", ".csv"]),
    ("fit HERE/no_json", ["HERE/no_json/run.json", "edited"]),
    ("fit HERE/a_list", ["HERE/a_list/run.json", "edited"]),
    ("fit HERE/no_records", ["HERE/no_records", "no spectral record"]),
    ("fit HERE/of_others", ["HERE/of_others", "schema_version"]),
    ("fit RUNS --bucket tail", ["`--bucket`", "`--where bucket=tail`"]),
    ("fit RUNS --csv", ["`--csv`", "`--format csv`"]),
    ("compare RUNS --width 64", ["`--width`", "--where"]),
    ("report RUNS --html page.html", ["`--html`", "`--out DIR`"]),
    ("report RUNS --out page.html", ["`--out page.html`", "folder", "--out page`"]),
    ("report RUNS --to-tensorboard FILE", ["--to-tensorboard", "FILE", "folder"]),
    ("records RUNS --bucket tail", ["`--bucket`", "`lightning_spectral.load(RUNS)`"]),
]

FULL: Final = [
    ("pretrain --config RECIPE --model_config.n_embd 64.0", ["`model_config.n_embd`", "64.0", "int"]),
]

EARLY: Final = [*RECIPES, *WORDS, *TABLES]
ALL: Final = [*EARLY, *FULL]
