"""What people get wrong: a command, and what its answer must name: the key, the value seen, the remedy.

Each is one line of the terminal, with ``RECIPE`` (a tiny one), ``TEXT``, ``RUNS`` (a study of three widths), ``POINTS``
(a table of points), ``KEYED`` (JSON lines whose text is called ``txt``), ``BLANK`` (a text file without text), ``FILE``
(a file where a folder is wanted), ``EMPTY`` (an empty folder), ``RECORDS`` (records without their folder) and ``TWICE``
(a recipe with a key twice) in the place of paths.
A group of mistakes ends before Lightning is imported unless its name says ``full``.
"""

from __future__ import annotations

from typing import Final

# (command, words that the answer must hold)
VERBS: Final = [
    ("pretran", ["`pretran`", "`pretrain`"]),
    ("train", ["`train`", "`pretrain`"]),
    ("optimizer_table", ["`optimizer_table`", "`optimizer-table`"]),
    ("--verison", ["`--verison`", "`--version`"]),
    ("help", ["`help`", "--help"]),
    ("version", ["`version`", "`--version`"]),
    ("help pretran", ["`help`", "--help"]),
    ("fits RUNS", ["`fits`", "`fit`"]),
]

PRETRAIN: Final = [
    ("pretrain --config quikstart", ["quikstart", "`quickstart`"]),
    ("pretrain --config nowhere.yaml", ["nowhere.yaml", "recipe"]),
    ("pretrain --config", ["`--config`", "YAML"]),
    ("pretrain quickstart", ["`quickstart`", "--config quickstart"]),
    ("pretrain --conf RECIPE", ["`--conf", "`--config`"]),
    ("pretrain --train.max_steps 3", ["--config"]),
    ("pretrain --config RECIPE --trian.max_steps 3", ["`trian`", "`train`"]),
    ("pretrain --config RECIPE --train.max_step 3", ["`train.max_step`", "`train.max_steps`"]),
    ("pretrain --config RECIPE --train.max-steps 3", ["`train.max-steps`", "`train.max_steps`"]),
    ("pretrain --config RECIPE --max_steps 3", ["`max_steps`", "`train.max_steps`"]),
    ("pretrain --config RECIPE --lr 1e-3", ["`lr`", "`optimizer.init_args.lr`"]),
    ("pretrain --config RECIPE --learning_rate 1e-3", ["`learning_rate`", "optimizer.init_args.lr"]),
    ("pretrain --config RECIPE --batch_size 8", ["`batch_size`", "train.global_batch_size"]),
    (
        "pretrain --config quickstart --every_n_steps 10",
        ["`every_n_steps`", "`callbacks.SpectralRankCallback.init_args"],
    ),
    ("pretrain --config RECIPE --train.max_steps", ["`--train.max_steps", "VALUE"]),
    ("pretrain --config RECIPE 50", ["`50`", "--key value"]),
    ("pretrain --config RECIPE -train.max_steps 5", ["`-train.max_steps`", "`--train.max_steps`"]),
    ("pretrain --config RECIPE --optimizer Moun", ["`Moun`", "`Muon`"]),
    ("pretrain --config RECIPE --optimizer muon", ["`muon`", "`Muon`"]),
    (
        "pretrain --config RECIPE --optimizer lightning_spectral.Moun",
        ["lightning_spectral.Moun", "`lightning_spectral.Muon`"],
    ),
    ("pretrain --config RECIPE --optimizer 3", ["`optimizer`", "`class_path`", "3"]),
    ("pretrain --config RECIPE --optimizer [Muon]", ["`optimizer`", "`class_path`", "Muon"]),
    ("pretrain --config RECIPE --optimizer my.own.Optimizer", ["`my.own.Optimizer`", "class path"]),
    ("pretrain --config RECIPE --optimizer.init_args.lrr 1", ["`lrr`", "`lr`"]),
    ("pretrain --config RECIPE --optimizer.lr 1e-3", ["`optimizer.lr`", "`optimizer.init_args.lr`"]),
    ("pretrain --config RECIPE --callbacks+ SpectralRankCalback", ["SpectralRankCalback", "`SpectralRankCallback`"]),
    (
        "pretrain --config RECIPE --callbacks SpectralRankCallback",
        ["`callbacks`", "SpectralRankCallback", "--callbacks+"],
    ),
    ("pretrain --config RECIPE --callbacks.TailTokenProb.init_args.counts stream", ["TailTokenProb", "--callbacks+"]),
    (
        "pretrain --config RECIPE --callbacks+ {class_path:\\ TailTokenProbe,\\ init_args:\\ {count:\\ x}}",
        ["`count`", "`counts`"],
    ),
    (
        "pretrain --config RECIPE --callbacks+ TailTokenProbe --callbacks.TailTokenProbe.every_n_steps 5",
        ["every_n_steps", "init_args"],
    ),
    ("pretrain --config RECIPE --data StateOfUnion", ["`StateOfUnion`", "`StateOfTheUnion`"]),
    ("pretrain --config RECIPE --data nowhere.txt", ["`data`", "`nowhere.txt`", "give a"]),
    ("pretrain --config RECIPE --data nowhere/", ["`data`", "`nowhere/`", "give a"]),
    ("pretrain --config RECIPE --data *.nothing", ["`data`", "`*.nothing`", "give a"]),
    ("pretrain --config RECIPE --data EMPTY", ["`data`", "EMPTY", "give a"]),
    ("pretrain --config RECIPE --data.init_args.vocab 5", ["`vocab`", "`vocab_size`"]),
    ("pretrain --config RECIPE --logger_name tensorbord", ["tensorbord", "tensorboard"]),
    ("pretrain --config RECIPE --model_name pythia-14 --model_config null", ["`pythia-14`", "`pythia-14m`"]),
    ("pretrain --config RECIPE --model_config.n_layers 3", ["`model_config.n_layers`", "`model_config.n_layer`"]),
    ("pretrain --config RECIPE --model_config 7", ["`model_config`", "7", "keys and values"]),
    (
        "pretrain --config RECIPE --architecture.activatoin relu",
        ["`architecture.activatoin`", "`architecture.activation`"],
    ),
    ("pretrain --config RECIPE --lr_schedule cosine", ["`lr_schedule`", "cosine", "kind"]),
    ("pretrain --config RECIPE --format tabel", ["`--format`", "tabel", "table"]),
    (
        "pretrain --config debug --callbacks.SpectralRankCallback.init_args.soft aprox",
        ["`callbacks.SpectralRankCallback.init_args.soft`", "aprox", "`approx`"],
    ),
    (
        "pretrain --config debug --callbacks.SpectralRankCallback.init_args.on_nonfinite ignore",
        ["`callbacks.SpectralRankCallback.init_args.on_nonfinite`", "ignore", "record"],
    ),
    ("pretrain --config RECIPE --print_confg", ["`--print_confg`", "`--print_config`"]),
    ("pretrain --config RECIPE --out_dir FILE", ["`out_dir`", "FILE", "folder"]),
    ("pretrain --config memory/one_step", ["`command: one-step`", "memory one-step"]),
    ("pretrain --config probe", ["`callbacks`", "LIGHTNING_SPECTRAL"]),
    ("pretrain --config POINTS", ["POINTS", "keys and values"]),
    ("pretrain --config EMPTY", ["EMPTY", "YAML file"]),
    ("pretrain --config RECIPE --optimizer my_package.Foo", ["`my_package.Foo`", "module `my_package`", "PYTHONPATH"]),
    ("pretrain --config RECIPE --optimizer Muonn", ["`Muonn`", "`Muon`"]),
    ("pretrain --config RECIPE --optimizer Muon --optimizer.init_args.momentumm 1", ["`momentumm`", "`momentum`"]),
    ("pretrain --config RECIPE --resume latest", ["`resume`", "`latest`", "`auto`"]),
]

# what a shell or a text editor makes of a command
PRETRAIN += [
    ("pretrain --config ''", ["--config", "YAML file"]),
    ("pretrain --config=", ["--config", "YAML file"]),
    ("pretrain --config debug --config quickstart", ["`--config`", "twice", "`debug`", "`base`"]),
    ("pretrain --config RECIPE --format json --format csv", ["`--format`", "twice", "`json`"]),
    ("pretrain --config RECIPE --train..max_steps 5", ["`--train..max_steps`", "empty name", "--train.max_steps"]),
    ("pretrain --config RECIPE --.train 5", ["`--.train`", "empty name"]),
    ("pretrain --config RECIPE --TRAIN.max_steps 5", ["`TRAIN`", "`train`"]),
    ("pretrain --config RECIPE --Train.Max_Steps 5", ["`Train`", "`train`"]),
    ("pretrain --config RECIPE --out_dir ''", ["`out_dir`", "a path", "null"]),
    ("pretrain --config RECIPE --optimizer.init_args.lr 1e-3,", ["`optimizer.init_args.lr`", "1e-3,", "float"]),
    ("pretrain --config TWICE", ["TWICE", "`model_name`", "twice", "keep one"]),
]

# values of another type or outside of a closed choice
PRETRAIN += [
    ("pretrain --config RECIPE --train.max_steps many", ["`train.max_steps`", "many", "int"]),
    ("pretrain --config RECIPE --train.max_steps 0", ["`train.max_steps`", "0", ">= 1"]),
    ("pretrain --config RECIPE --train.max_steps -5", ["`train.max_steps`", "-5", ">= 1"]),
    ("pretrain --config RECIPE --train.max_steps 1.5", ["`train.max_steps`", "1.5", "int"]),
    ("pretrain --config RECIPE --optimizer.init_args.lr fast", ["`optimizer.init_args.lr`", "fast", "float"]),
    ("pretrain --config RECIPE --accelerator gpu", ["`accelerator`", "gpu", "cpu"]),
    ("pretrain --config RECIPE --accelerator tpu", ["`accelerator`", "tpu", "cpu"]),
    ("pretrain --config RECIPE --devices none", ["`devices`", "none", "auto"]),
    ("pretrain --config RECIPE --strategy fdsp", ["`strategy`", "fdsp", "fsdp"]),
    ("pretrain --config RECIPE --precision fp16", ["`precision`", "fp16", "16-true"]),
    ("pretrain --config RECIPE --model_config.n_embd wide", ["`model_config.n_embd`", "wide"]),
    ("pretrain --config RECIPE --architecture.activation rellu", ["`architecture.activation`", "rellu", "relu"]),
    ("pretrain --config RECIPE --lr_schedule.kind cosin", ["`lr_schedule.kind`", "cosin", "cosine"]),
    ("pretrain --config RECIPE --eval.interval 0", ["`eval.interval`", "0", ">= 1"]),
    ("pretrain --config RECIPE --seed lucky", ["`seed`", "lucky", "int"]),
    ("pretrain --config RECIPE --log.project mine", ["`log.project`", "wandb", "csv"]),
    ("pretrain --config RECIPE --precision bf16", ["`precision`", "bf16", "`bf16-mixed`"]),
    ("pretrain --config RECIPE --strategy ddpp", ["`strategy`", "ddpp", "`ddp`"]),
    ("pretrain --config RECIPE --strategy hsdp", ["`strategy: hsdp`", "replicas", "`hsdp:2`"]),
    (
        "pretrain --config RECIPE --strategy {class_path:\\ lightning.pytorch.strategies.DDPP}",
        ["`strategy`", "DDPP", "class path"],
    ),
    ("pretrain --config RECIPE --accelerator gup", ["`accelerator`", "gup", "`gpu`"]),
    ("pretrain --config RECIPE --devices 0", ["`devices`", "0", "auto"]),
    ("pretrain --config RECIPE --devices 0,1", ["`devices`", "0,1", "auto"]),
    ("pretrain --config RECIPE --num_nodes two", ["`num_nodes`", "two", "int"]),
    ("pretrain --config RECIPE --architecture.positions ropee", ["`architecture.positions`", "ropee", "`rope`"]),
    ("pretrain --config RECIPE --architecture.init papre", ["`architecture.init`", "papre", "`paper`"]),
    (
        "pretrain --config RECIPE --model_config.norm_class_name RMSnorm",
        ["`model_config.norm_class_name`", "RMSnorm", "`RMSNorm`"],
    ),
    ("pretrain --config RECIPE --train.tie_embeddings maybe", ["`train.tie_embeddings`", "maybe", "bool"]),
    (
        "pretrain --config debug --callbacks.TailTokenProbe.init_args.attribute_to inptu",
        ["`callbacks.TailTokenProbe.init_args.attribute_to`", "inptu", "`input`"],
    ),
    (
        "pretrain --config RECIPE --optimizer Muon --optimizer.init_args.nesterov maybe",
        ["`optimizer.init_args.nesterov`", "maybe", "bool"],
    ),
    (
        "pretrain --config debug --callbacks.TailTokenProbe.init_args.sites [psot]",
        ["`callbacks.TailTokenProbe.init_args.sites`", "psot", "`post`"],
    ),
    (
        "pretrain --config debug --callbacks.TailTokenProbe.init_args.modules x.down",
        ["`callbacks.TailTokenProbe.init_args.modules`", "list", "[x.down]"],
    ),
    ("pretrain --config RECIPE --data.init_args.seed lucky", ["`data.init_args.seed`", "lucky", "int"]),
]

PRETRAIN_FULL = [
    ("pretrain --config RECIPE --resume true", ["`resume: true`", "`resume: auto`"]),
    ("pretrain --config RECIPE --optimizer.init_args.lr -1", ["optimizer", "lr", "-1"]),
    ("pretrain --config RECIPE --optimizer.init_args.betas 0.9", ["optimizer", "betas", "0.9"]),
    ("pretrain --config RECIPE --tokenizer_dir nope", ["`tokenizer_dir`", "`nope`"]),
    ("pretrain --config RECIPE --initial_checkpoint_dir nope", ["`initial_checkpoint_dir`", "`nope`"]),
    ("pretrain --config RECIPE --resume nope.ckpt", ["`resume`", "`nope.ckpt`", "`auto`"]),
    (
        "pretrain --config RECIPE --train.global_batch_size 6",
        ["`train.global_batch_size`", "6", "`train.micro_batch_size`"],
    ),
    ("pretrain --config RECIPE --train.max_seq_length 4096", ["`train.max_seq_length`", "4096", "`block_size`"]),
    ("pretrain --config RECIPE --train.max_steps null", ["`train.max_tokens`", "`train.max_steps`"]),
    ("pretrain --config RECIPE --train.max_tokens 3 --train.max_steps null", ["`train.max_tokens`", "one takes"]),
    ("pretrain --config RECIPE --model_config.n_head 3", ["n_head", "n_embd"]),
    ("pretrain --config RECIPE --model_config.padded_vocab_size 100", ["`padded_vocab_size`", "100", "raise"]),
    ("pretrain --config RECIPE --architecture.ffn_multiplier 0", ["`architecture.ffn_multiplier`", "0"]),
    (
        "pretrain --config RECIPE --callbacks+ lightning.pytorch.Trainer",
        ["`callbacks`", "lightning.pytorch.Trainer", "Callback"],
    ),
    (
        "pretrain --config RECIPE --callbacks+ {class_path:\\ TailTokenProbe,\\ init_args:\\ {every_n_steps:\\ 0}}",
        ["every_n_steps", "0", ">= 1"],
    ),
    (
        "pretrain --config RECIPE --callbacks+ {class_path:\\ TailTokenProbe,\\ init_args:\\ {counts:\\ no.npy}}",
        ["counts", "no.npy", "count-tokens"],
    ),
]

PRETRAIN_FULL += [
    ("pretrain --config RECIPE --optimizer torch.optim.Muon", ["`optimizer`", "Muon", "2D"]),
    ("pretrain --config RECIPE --data KEYED", ["`text`", "`txt`", "`data.init_args.text_column`"]),
    ("pretrain --config RECIPE --data BLANK", ["`data`", "no text", "BLANK"]),
]

SWEEP: Final = [
    ("sweep quikstart", ["`quikstart`", "`quickstart`"]),
    ("sweep", ["recipe", "YAML file"]),
    ("sweep RECIPE", ["RECIPE", "`sweep:`", "--axis"]),
    ("sweep --config RECIPE --axis seed=0,1", ["`--config`", "recipe"]),
    ("sweep RECIPE --axis sed=1,2", ["`sed`", "`seed`"]),
    ("sweep RECIPE --axis seed", ["`seed`", "key=a,b,c"]),
    ("sweep RECIPE --axis seed=", ["seed=", "key=a,b,c"]),
    ("sweep RECIPE --axis optimizer=SGD,AdamWW", ["`AdamWW`", "`AdamW`"]),
    ("sweep RECIPE --axes seed=0,1", ["`--axes`", "`--axis`"]),
    ("sweep RECIPE --axis seed=0,1 --wokers 2", ["`--wokers`", "`--workers`"]),
    ("sweep RECIPE --axis seed=0,1 --workers 0", ["--workers", "0", ">= 1"]),
    ("sweep RECIPE --axis seed=0,1 --workers two", ["--workers", "two", "whole number"]),
    ("sweep RECIPE --axis seed=0,1 --launcher slrum", ["--launcher", "slrum", "local"]),
    ("sweep RECIPE --axis seed=0,1 --dry_run", ["`--dry_run`", "`--dry-run`"]),
    ("sweep RECIPE --smoke", ["RECIPE", "`smoke:`"]),
    ("sweep pocket_study --axis optimizer=AdamW,Moun --dry-run", ["`optimizer`", "`Moun`", "Muon"]),
    ("plan quikstart", ["`quikstart`", "`quickstart`"]),
    ("plan RECIPE --gpu h1000", ["--gpu", "h1000", "h100"]),
    ("plan RECIPE --mfu 40", ["--mfu", "40", "(0, 1]"]),
    ("plan RECIPE --num-gpus 0", ["--num-gpus", "0", ">= 1"]),
    ("plan RECIPE --num_gpus 2", ["`--num_gpus`", "`--num-gpus`"]),
    ("plan RECIPE --train.max_step 3", ["`train.max_step`", "`train.max_steps`"]),
]

SWEEP += [
    ("sweep RECIPE --axis train.max_steps=0,4 --dry-run", ["`train.max_steps`", "0", ">= 1"]),
    ("sweep RECIPE --axis optimizer.init_args.lr=fast --dry-run", ["optimizer.init_args.lr", "fast", "float"]),
    ("sweep RECIPE --axis strategy=ddp,fdsp --dry-run", ["`strategy`", "fdsp", "`fsdp`"]),
    ("sweep RECIPE --axis seed=0,1 --axis seed=2", ["`seed`", "twice", "`seed=a,b,c`"]),
    ("sweep RECIPE --axis seed=0..3 --dry-run", ["`seed`", "0..3", "int"]),
    ("plan RECIPE --precision bf16", ["`precision`", "bf16", "`bf16-mixed`"]),
]

SWEEP_FULL: Final = [
    ("sweep RECIPE --axis model_config.n_head=3,2 --dry-run", ["n_head", "n_embd"]),
    ("sweep RECIPE --axis optimizer=AdamW,torch.optim.Muon --dry-run", ["`optimizer`", "Muon", "2D"]),
    ("sweep debug --axis seed=0,0 --dry-run", ["`seed-0`", "once"]),
]

ANALYSIS: Final = [
    ("fit", ["RUNS|points.csv", "run folders"]),
    ("fit nowhere", ["`nowhere`", "run folder"]),
    ("fit nowhere.csv", ["`nowhere.csv`"]),
    ("fit EMPTY", ["EMPTY", "run folder"]),
    ("fit FILE", ["FILE", "run folder"]),
    ("fit POINTS --y rank", ["`rank`", "value"]),
    ("fit POINTS --x witdh", ["`witdh`", "`width`"]),
    ("fit POINTS --by optimiser", ["`optimiser`", "`optimizer`"]),
    ("fit POINTS --where optimizer", ["optimizer", "!="]),
    ("fit POINTS --where optimizer=nobody", ["nobody", "optimizer"]),
    ("fit POINTS --method olls", ["olls", "ols"]),
    ("fit RUNS --method olls", ["olls", "ols"]),
    ("fit RUNS --metrics hardrank", ["`hardrank`", "hard_rank"]),
    ("fit RUNS --metrcs hard_rank", ["`--metrcs`", "`--metrics`"]),
    ("fit RUNS --last 0", ["--last", "0", ">= 1"]),
    ("fit RUNS --last five", ["--last", "five", "whole number"]),
    ("fit RUNS --last", ["--last", "whole number"]),
    ("fit RUNS --until-step -1", ["--until-step", "-1"]),
    ("fit RUNS --until_step 10", ["`--until_step`", "`--until-step`"]),
    ("fit RUNS --stage validaton", ["validaton", "train"]),
    ("fit RUNS --by optimizer,rank", ["`rank`", "optimizer"]),
    ("fit RUNS --model flor", ["--model", "flor", "floor"]),
    ("fit RUNS --out FILE", ["--out", "FILE", "folder"]),
    ("fit RUNS POINTS", ["tables or run folders"]),
    ("fit RUNS --format xml", ["--format", "xml", "csv"]),
    ("compare RUNS --match-on step_count", ["--match-on", "step_count", "step"]),
    ("compare RUNS --tolerance -1", ["--tolerance", "-1", ">= 0"]),
    ("power RUNS --amount -1", ["--amount", "-1", "> 0"]),
    ("compare RUNS --architecture depth", ["depth"]),
    ("report RUNS --site psot", ["--site", "psot", "post"]),
    ("report RUNS --out FILE", ["--out", "FILE", "folder"]),
    ("report nowhere", ["`nowhere`", "run folder"]),
    ("report RUNS --by optimizer", ["--by", "label"]),
    ("records nowhere", ["`nowhere`", "spectral.jsonl"]),
    ("records EMPTY", ["EMPTY", "spectral.jsonl", "`out_dir` of a run"]),
    ("import EMPTY --out imported", ["EMPTY", ".jsonl", "event file"]),
    ("records RUNS --kind spectrl", ["spectrl", "spectral"]),
    ("records RUNS --out table.xlsx", ["table.xlsx", "--format"]),
    ("records RUNS --format parquet", ["parquet", "--out"]),
    ("schema recipes", ["`recipes`", "`recipe`"]),
    ("schema", ["WHAT", "recipe"]),
    ("completion fsh", ["`fsh`", "`zsh`"]),
]

ANALYSIS += [
    ("fit RECORDS", ["RECORDS", "run folder", "`run.json`"]),
    ("fit https://example.com/points.csv", ["`https://example.com/points.csv`", "download"]),
    ("fit wandb://entity/project", ["`wandb://entity/project`", "wandb artifact get", "`import`"]),
    ("fit 'out/*_512'", ["`out/*_512`", "pattern"]),
    ("fit out/a,out/b", ["`out/a,out/b`", "separated by spaces"]),
    ("fit RUNS --metrics soft-rank", ["`soft-rank`", "`soft_rank`"]),
    ("records RUNS --out EMPTY --format csv", ["EMPTY", "folder"]),
    ("import RUNS --out imported", ["RUNS", "run folder already", "`fit`"]),
]

MODELS: Final = [
    ("measure nowhere --data TEXT", ["`nowhere`", "checkpoint"]),
    ("measure EMPTY", ["--data"]),
    (
        "measure EleutherAI/pythia-14m@step1 --data TEXT",
        ["hf download EleutherAI/pythia-14m --revision step1", "`measure pythia-14m`"],
    ),
    ("count-tokens --data KEYED --out counts.npy", ["`text`", "`txt`", "`--text_column`"]),
    ("measure EMPTY --data TEXT --tokens 0", ["`--tokens`", "0", ">= 1"]),
    ("measure EMPTY --data TEXT --batch_size -1", ["`--batch_size`", "-1", ">= 1"]),
    ("measure EMPTY --data TEXT --tokens few", ["--tokens", "few", "whole number"]),
    ("measure EMPTY --data TEXT --sites psot", ["--sites", "psot", "post"]),
    ("measure EMPTY --data TEXT --token 10", ["`--token`", "`--tokens`"]),
    ("measure EMPTY EMPTY EMPTY --data TEXT", ["EMPTY", "lit_model.pth"]),
    ("count-tokens --data TEXT --out counts.txt", ["`--out`", "counts.txt", ".npy"]),
    ("count-tokens --data nowhere.txt --out counts.npy", ["`nowhere.txt`", "--data"]),
    ("count-tokens --data TEXT", ["--out", ".npy"]),
    ("count-tokens --data TEXT --out counts.npy --vocab_size 10", ["--vocab_size", "10", "256"]),
    ("count-tokens --data TEXT --out counts.npy --text_column body --tokenizer_dir nope", ["nope", "--tokenizer_dir"]),
    ("memory one-stp", ["one-stp", "`one-step`"]),
    ("memory", ["one-step"]),
    ("memory one-step --d -8", ["--d", "-8"]),
    ("memory one-step --d wide", ["--d", "wide"]),
    ("memory one-step --alpha 0", ["--alpha", "0"]),
    ("memory one-step --config nowhere.yaml", ["--config", "nowhere.yaml"]),
    ("memory one-step --config RECIPE", ["--config", "RECIPE", "one-step"]),
    ("memory reproduce --budget long", ["--budget", "long", "3m"]),
    ("memory advise --counts no.npy --d 64", ["--counts", "no.npy"]),
]

MODELS_FULL: Final = [
    ("memory one-step --rules moun", ["moun", "muon"]),
    ("count-tokens --data BLANK --out counts.npy", ["`--data`", "no text", "BLANK"]),
    ("measure EMPTY --data TEXT", ["EMPTY", "lit_model.pth"]),
    ("measure EMPTY --data nowhere.txt", ["`nowhere.txt`", "--data"]),
    ("inspect pythia-14", ["pythia-14", "`pythia-14m`"]),
    ("inspect pythia-14m --model-args n_layers=2", ["n_layers", "n_layer"]),
    ("inspect pythia-14m --buckets 0", ["--buckets", "0", ">= 1"]),
    ("inspect pythia-14m --modules nothing*", ["nothing*", "modules"]),
    ("optimizer-table --model pythia-14", ["--model pythia-14", "`pythia-14m`"]),
    ("optimizer-table --model pythia-14m --optimizer Moun", ["`Moun`", "`Muon`"]),
    ("optimizer-table --model pythia-14m --set lrr=1", ["--set lrr", "`lr`"]),
    ("optimizer-table --model pythia-14m --set lr", ["--set", "lr", "NAME=VALUE"]),
    ("optimizer-table", ["--model"]),
]

ALL: Final = [*VERBS, *PRETRAIN, *PRETRAIN_FULL, *SWEEP, *SWEEP_FULL, *ANALYSIS, *MODELS, *MODELS_FULL]
