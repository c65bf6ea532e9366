"""Mistakes of another hundred and seventy tries whose answers were no good; as in :mod:`tests.cli.mistakes`."""

from __future__ import annotations

from typing import Final

CALLBACK: Final = "pretrain --config RECIPE --callbacks+ {class_path:\\"
ALARM: Final = f"{CALLBACK} SpectralAlarm,\\ init_args:\\ "

EARLY = [
    ("pretrain --config RECIPE --train={max_steps: 3}", ["`--train`", "`{max_steps:`", "`3}`", "quotes"]),
    ("pretrain --config RECIPE --train {max_steps:3}", ["`train.max_steps:3`", "`max_steps: 3`", "space"]),
    (
        "pretrain --config RECIPE --callbacks+ {class_path:\\ TailTokenProbe,\\ init_args:\\ {modules:\\ [*.x]}}",
        ["`--callbacks+`", "*.x", "YAML", "quotes of their own"],
    ),
    (
        "pretrain --config RECIPE --data.init_args.vocab_size 300 --data TEXT",
        ["`--data`", "`--data.init_args.vocab_size`", "first"],
    ),
    (
        "pretrain --config RECIPE --optimizer.init_args.lr .1 --optimizer SGD",
        ["`--optimizer`", "`--optimizer.init_args.lr`", "first"],
    ),
    (
        "pretrain --config RECIPE --callbacks+ {clas_path:\\ TailTokenProbe}",
        ["`callbacks`", "`clas_path`", "`class_path`"],
    ),
    ("pretrain --config RECIPE --callbacks.0.every_n_steps 5", ["`callbacks.0`", "--callbacks+ NAME"]),
    ("pretrain --config RECIPE --callbacks+ QKClipCalback", ["QKClipCalback", "`QKClipCallback`"]),
    ("pretrain --config RECIPE --callbacks+ EarlyStoping", ["EarlyStoping", "`EarlyStopping`"]),
    (
        "pretrain --config RECIPE --callbacks+ {class_path:\\ QKClipCallback,\\ init_args:\\ {treshold:\\ 5}}",
        ["QKClipCallback", "`treshold`", "`threshold`"],
    ),
    (ALARM + "{belw:\\ 0.5}}", ["SpectralAlarm", "`belw`", "`below`"]),
    (
        ALARM + "{below:\\ 0.5,\\ relative_to:\\ widht}}",
        ["`callbacks.SpectralAlarm.init_args.relative_to`", "widht", "`width`"],
    ),
    ("pretrain --config RECIPE --model_config.n_head 0", ["`model_config.n_head`", "0", ">= 1"]),
    ("pretrain --config RECIPE --model_config.n_layer -1", ["`model_config.n_layer`", "-1", ">= 1"]),
    (
        "pretrain --config RECIPE --model_config.intermediate_size 0",
        ["`model_config.intermediate_size`", "0", ">= 1"],
    ),
    ("pretrain --config RECIPE --train.lr_warmup_steps -1", ["`train.lr_warmup_steps`", "-1", ">= 0"]),
    ("pretrain --config RECIPE --num_nodes 0", ["`num_nodes`", "0", ">= 1"]),
    ("pretrain --config RECIPE --seed -1", ["`seed`", "-1", ">= 0"]),
    ("pretrain --config RECIPE --base quickstart", ["`base`", "`base: NAME`"]),
    ("pretrain --config RECIPE --width 512", ["`width`", "`model_config.intermediate_size`"]),
    (
        "pretrain --config RECIPE --data https://example.com/x.txt",
        ["`data`", "`https://example.com/x.txt`", "download"],
    ),
    ("sweep RECIPE seed=0,1", ["`seed=0,1`", "--axis seed=0,1"]),
    ("sweep RECIPE --axis seed 0,1", ["`seed`", "key=a,b,c"]),
    ("sweep RECIPE --axis width=64,128", ["`width`", "`model_config.intermediate_size`"]),
    (
        "sweep RECIPE --axis optimizer=Muon --axis optimizer.init_args.momentumm=.9 --dry-run",
        ["Muon", "`momentumm`", "`momentum`"],
    ),
    ("fit RUNS --where width<x", ["`--where width<x`", "'x'", "numbers"]),
    ("fit RUNS --stack nowhere", ["`--stack nowhere`", "leave out"]),
    ("fit RUNS --by bukcet", ["`bukcet`", "`bucket`"]),
    ("fit POINTS --x width --y width", ["`--x`", "`--y`", "`width`", "column"]),
    ("report POINTS --site pre", ["`--site`", "`--where site=pre`"]),
    ("import TEXT --out imported", ["TEXT", "event files", "W&B"]),
    ("count-tokens --data TEXT --out FILE/c.npy", ["`--out FILE/c.npy`", "file", "folder"]),
    ("optimizer-table --modle pythia-14m", ["`--modle`", "`--model`"]),
    ("memory reproduce --budget -3m", ["`--budget`", "`-3m`", "--budget=-3m"]),
    ("inspect pythia-14m --ranks 0", ["`--ranks`", "0", ">= 1"]),
    ("inspect pythia-14m --memory-limit-mib -5", ["`--memory-limit-mib`", "-5", "> 0"]),
]

EARLY += [
    ("measure EMPTY --data TEXT --shards 0", ["`--shards`", "0", ">= 1"]),
]

FULL: Final = [
    (ALARM + "{below:\\ 0.5}}", ["SpectralAlarm", "`tail`", "TailTokenProbe"]),
    (
        f"{CALLBACK} WeightSpectrumCallback,\\ init_args:\\ {{what:\\ [wieght]}}}}",
        ["`what`", "wieght", "`weight`"],
    ),
    ("inspect TEXT:Net", ["`TEXT:Net`", "no model", "train.py:Net"]),
    ("optimizer-table --model pythia-14m --optimizer Muon --set lr=fast", ["`--set`", "`lr`", "fast", "number"]),
    ("optimizer-table --model pythia-14m --optimizer SGD", ["`--optimizer`", "`SGD`", "Muon"]),
]

ALL: Final = [*EARLY, *FULL]
