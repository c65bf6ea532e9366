"""Every snippet of the site runs; every command, option, recipe, file and class that it names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

import lightning_spectral
from lightning_spectral.analysis.load import rows
from lightning_spectral.cli import VERBS, main
from lightning_spectral.cli.parser import VerbParser
from lightning_spectral.probe import settings
from lightning_spectral.probe.scalars import detail
from lightning_spectral.records import STATUSES, read_spectral
from lightning_spectral.training.names import keys
from tests.analysis.synthetic import write_one
from tests.callbacks import tiny
from tests.callbacks.test_measuring import oracle_ranks

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXT = {page.relative_to(DOCS).as_posix(): page.read_text() for page in PAGES}
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.S)
SNIPPETS = [(name, code) for name, text in TEXT.items() for kind, code in BLOCK.findall(text) if kind == "python"]
OWN = [(name, code) for name, code in SNIPPETS if "--8<--" not in code]
SHELL = [
    (name, line.split("#")[0].strip())
    for name, text in TEXT.items()
    for kind, code in BLOCK.findall(text)
    if kind == "bash" and "--8<--" not in code
    for line in code.splitlines()
]
INLINE = [(name, code) for name, text in TEXT.items() for code in re.findall(r"`(lightning-spectral [^`]+)`", text)]


@pytest.mark.parametrize(("page", "code"), OWN, ids=[f"{name}-{k}" for k, (name, _) in enumerate(OWN)])
@pytest.mark.filterwarnings("ignore")
def test_python_snippets_run(page, code, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "model": tiny.Module(),
        "train_loader": tiny.loader(),
        "named_model": tiny.Module(),
        "counts": tiny.counts(),
        "network": tiny.Module().gpt,
        "batches": list(tiny.loader()),
    }
    monkeypatch.setattr(settings, "BUCKET_RULES", {**settings.BUCKET_RULES})  # a snippet adds a rule of its own
    exec(code, {**given, "run_folder": write_one(tmp_path, "muon", 0.9, 64), "Fabric": Fabric})


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every call of ours."""
    found = []
    for page, line in SHELL + INLINE:
        for part in re.split(r"&&|\||>", line):
            words = shlex.split(part)
            while words and "=" in words[0]:
                words = words[1:]
            if words[:1] == ["lightning-spectral"]:
                found.append((page, words[1:]))
    return found


def test_commands_name_verbs_options_and_recipes_that_exist(capsys) -> None:
    helps: dict[str, str] = {}
    assert len(commands()) > 20
    for page, (verb, *words) in commands():
        if verb in ("VERB", "--version", "--help"):
            continue
        assert verb in VERBS, (page, verb)
        action = words[0] if verb == "memory" else ""
        key = f"{verb} {action}".strip()
        if key not in helps:
            with pytest.raises(SystemExit) if verb != "pretrain" else nothing() as _:
                main([*key.split(), "--help"])
            helps[key] = capsys.readouterr().out
        for word in words:
            is_key = verb in ("pretrain", "sweep", "plan") and word[2:].partition("=")[0] in keys()
            if word.startswith("--") and "." not in word and not is_key:
                assert word in helps[key], (page, key, word)
        if verb in ("sweep", "plan") and not words[0].startswith("-"):
            assert (ROOT / "recipes" / f"{words[0]}.yaml").exists(), (page, words[0])
        if "--config" in words:
            recipe = words[words.index("--config") + 1].removeprefix("recipes/").removesuffix(".yaml")
            assert (ROOT / "recipes" / f"{recipe}.yaml").exists(), (page, recipe)


class Parsed(Exception):
    """Raised in the place of what a verb would do."""


def test_commands_have_the_arguments_that_their_verbs_want(monkeypatch) -> None:
    """Of every verb whose parser takes all words (recipe keys of the others are checked above)."""
    parse = VerbParser.parse_args

    def only_parsed(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(VerbParser, "parse_args", only_parsed)
    monkeypatch.chdir(ROOT)
    tried = 0
    for page, (verb, *words) in commands():
        if verb in VERBS and verb not in ("pretrain", "sweep", "plan") and "--help" not in words and words:
            with pytest.raises(Parsed):
                assert main([verb, *words]) == 0, (page, verb, words)
            tried += 1
    assert tried > 15


class nothing:
    """A block that may end as it likes: one verb returns from its help, others leave by SystemExit."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, traceback) -> bool:
        return kind is SystemExit


def test_yaml_snippets_are_yaml_and_name_classes_that_exist() -> None:
    for page, text in TEXT.items():
        for kind, code in BLOCK.findall(text):
            if kind == "yaml" and "--8<--" not in code:
                assert yaml.safe_load(code), page
                for name in re.findall(r"class_path: lightning_spectral\.(\w+)", code):
                    assert hasattr(lightning_spectral, name), (page, name)


def test_pictures_links_and_included_files_exist() -> None:
    for page, text in TEXT.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (DOCS / page).parent.joinpath(target).exists(), (page, target)
        for target in re.findall(r'--8<-- "([^"]+)"', text):
            assert (ROOT / target).exists(), (page, target)


def test_every_page_is_in_the_navigation_and_every_public_class_in_the_reference() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in TEXT:
        assert page in navigation, page
    reference = "\n".join(text for page, text in TEXT.items() if page.startswith("reference/"))
    for name in set(lightning_spectral.__all__) - {"__version__"}:
        home = getattr(lightning_spectral, name).__module__
        assert f"::: {home}.{name}" in reference or f"::: {home}\n" in reference, name


QUESTIONS = {  # what strangers asked, in their words, and a word of the code that answers
    "my own LightningModule": "TailTokenProbe",
    "validation text": 'on=["validation"]',
    "my tokenizer": "frequency_buckets",
    "four widths": "my_widths.py",
    "Muon for the hidden matrices": "fallback_lr",
    "dark mode": "dark mode",
    "W&B": "WandbLogger",
    "public checkpoints": "snapshot_download",
    "requeued SLURM job": "ckpt_path",
    "before I start": "inspect",
    "stop when a rank collapses": "should_stop",
    "not measured, and why": "mask_fn",
    "pandas": "load(",
    "cite": "CITATION.cff",
    "pin a version": "constraints.txt",
    "several nodes": "ModelParallelStrategy",
    "resume a Hugging Face": "resume_from_checkpoint=True",
    "DeepSpeed": "engine.step()",
    "plain loop, Fabric": "probe.step()",
    "leave padding out": "lambda arguments",
    "resume a loop of my own": "probe.num_steps",
    "resume my own Trainer": 'ckpt_path="last"',
    "has cost my run": 'row["window_s"]',
    "names say a step": "revision-1000",
    "such a number may be used": "hard_rank_across_sequences",
    "a curve of my own": "savefig",
    "token counts of my own": "np.bincount",
    "prelude, core, coda": "--stack core",
    "pipeline stages": "new_group",
    "how to cite it": "@misc",
    "W&B and TensorBoard": "TensorBoardLogger",
    "widths and seeds I need": "lightning-spectral power",
    "rule of my own": "BUCKET_RULES[",
    "two optimizers": "several optimizers",
    "how much disk": "1.3 KB",
    "under bf16": "sums in fp32",
    "single experts": "`expert`",
    "my platform": "macOS",
}


def included(text: str) -> str:
    """A page with the files that it shows, wherever its lines end."""
    return " ".join(re.sub(r'--8<-- "([^"]+)"', lambda found: (ROOT / found[1]).read_text(), text).split())


@pytest.mark.parametrize(("words", "answer"), QUESTIONS.items(), ids=list(QUESTIONS))
def test_a_strangers_question_is_one_row_and_one_link_away_from_the_code(words: str, answer: str) -> None:
    rows = [line for line in TEXT["which-question.md"].splitlines() if words in [*line.split("|"), "", ""][1]]
    assert rows, words
    pages = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", rows[0])]
    assert any(answer in included(TEXT[page]) for page in pages if page in TEXT) or answer in rows[0], rows[0]


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as MkDocs makes them."""
    plain = [re.sub(r"[^\w\s-]", "", line.lstrip("# ")).strip().lower() for line in headings(text)]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def headings(text: str) -> list[str]:
    """Lines of headings, those in blocks of code left out."""
    return [line for line in BLOCK.sub("", text).splitlines() if line.startswith("#")]


def test_links_into_pages_lead_to_headings() -> None:
    tried = 0
    for page, text in TEXT.items():
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text):
            aim = (DOCS / page).parent.joinpath(target).resolve().relative_to(DOCS).as_posix() if target else page
            assert anchor in anchors(TEXT[aim]), (page, target, anchor)
            tried += 1
    assert tried > 20


def test_what_deepspeed_is_refused_with_is_said_by_the_code() -> None:
    section = TEXT["scale.md"].partition("## DeepSpeed")[2].partition("\n## ")[0]
    code = "".join(
        (ROOT / "lightning_spectral" / name).read_text() for name in ("probe/weight_spectra.py", "optim/members.py")
    )
    said = re.sub(r'"\s+f?"', "", code)
    quotes = re.findall(r'refused[^"|]*"([^"]+)"', section)
    assert len(quotes) == 2
    for quote in quotes:
        assert quote in said, quote


def test_every_verb_is_in_the_table() -> None:
    for verb in VERBS:
        assert f"| `{verb}` |" in TEXT["verbs.md"], verb


def test_every_status_is_explained() -> None:
    for status in STATUSES:
        assert f"`{status}`" in TEXT["numbers.md"], status


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "beginning", ["from lightning import Trainer\nfrom lightning.pytorch.callbacks", "from pathlib"]
)
def test_snippets_on_resuming_go_on(beginning: str, tmp_path, monkeypatch) -> None:
    """Cut after two steps and started again, each leaves the records of one run."""
    monkeypatch.chdir(tmp_path)
    section = TEXT["your-script.md"].partition("## Resuming")[2].partition("\n## ")[0]
    (code,) = [code for kind, code in BLOCK.findall(section) if kind == "python" and code.startswith(beginning)]
    assert code.count("4") == 1  # steps
    for whole in (code.replace("4", "2"), code, code):
        given = {"model": tiny.Module(), "train_loader": tiny.loader()}
        exec(whole, {**given, "network": tiny.Module().gpt, "batches": list(tiny.loader())})
    (file,) = tmp_path.rglob("spectral.jsonl")
    records = read_spectral(file.parent).records
    assert len({record.run_id for record in records}) == 1
    assert {0, 2} <= {record.step for record in records} <= {0, 1, 2, 3}
    assert len({record.key for record in records}) == len(records)


def test_columns_of_load_are_those_that_are_named(tmp_path) -> None:
    named = TEXT["numbers.md"].partition("\nColumns: ")[2].partition("\n\n")[0]
    folder = write_one(tmp_path, "muon", 0.9, 64)
    there = {name for name in rows(folder)[0] if not name.startswith("renyi_") or name == "renyi_0.5"}
    more = {"hard_rank_across_sequences", "reinjection_0.5", "label_NAME", "loss", "accuracy"}
    said = set(re.findall(r"`(\w+(?:\.5)?)`", named))
    assert said - more == {name for name in there if not name.startswith(("label_", "reinjection_"))} - more


def test_bibtex_says_what_the_citation_file_says() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (bibtex,) = [code for kind, code in BLOCK.findall(TEXT["index.md"]) if kind == "bibtex"]
    for paper in citation["references"]:
        authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
        for field in (f"title = {{{paper['title']}}}", f"author = {{{authors}}}", paper["identifiers"][0]["value"][6:]):
            assert field in bibtex, field
    assert f"version = {{{lightning_spectral.__version__}}}" in bibtex
    assert citation["authors"][0]["name"] in bibtex
    assert "doi" not in bibtex.lower()


class _Looped(nn.Module):
    """A prelude, two blocks that run three times, a coda."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        sizes = {"prelude": 1, "core": 2, "coda": 2}
        for name, size in sizes.items():
            setattr(self, name, nn.ModuleList(_Block() for _ in range(size)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in (*self.prelude, *3 * [*self.core], *self.coda):
            x = block(x)
        return self.head(x)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_stacks_of_a_looped_model_are_named_as_the_table_says(tmp_path) -> None:
    section = TEXT["numbers.md"].partition("## Layers that run again")[2].partition("\n## ")[0]
    cells = [re.findall(r"[\w.]+", cell) for cell in re.findall(r"^\|(.*?\|.*?\|.*?)\|", section, re.M)[2:]]
    said = {}
    for stack, *more in cells:
        said[stack] = ([int(word) for word in more if word.isdigit()], [word for word in more if ".down" in word])
    model = _Looped()
    with lightning_spectral.observe(model, out=tmp_path) as probe:
        ids = torch.randint(64, (8, 17))
        nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        probe.step()
    records = read_spectral(tmp_path).records
    assert {record.stack for record in records} == {*said}
    for stack, (layers, modules) in said.items():
        own = [record for record in records if record.stack == stack]
        assert [record.layer for record in own] == layers
        assert [record.module for record in own][: len(modules)] == modules
    (tag,) = re.findall(r"`(spectral\.hard_rank[^`]+)`", section)
    assert tag in detail(records, "train")


def test_the_input_of_any_linear_layer_can_be_named(tmp_path) -> None:
    """As the page says of attention's output projection: hard ranks equal an oracle on what flows into it."""
    gpt, ids = tiny.Module().gpt, next(iter(tiny.loader()))[:, :-1]
    rows_ND: list[torch.Tensor] = []
    gpt.transformer.h[1].attn.proj.register_forward_pre_hook(
        lambda _, given: rows_ND.append(given[0].detach().flatten(0, -2))
    )
    with lightning_spectral.observe(gpt, out=tmp_path, modules=["*.attn.proj"]) as probe:
        gpt(ids).sum().backward()
        probe.step()
    record = read_spectral(tmp_path).records[-1]
    assert (record.module, record.num_tokens) == ("transformer.h.1.attn.proj", ids.numel())
    assert record.hard_rank == pytest.approx(oracle_ranks(rows_ND[0].double())[1], rel=1e-5)  # fp32 products


PAD = 3


def padded() -> torch.Tensor:
    """Sequences that end in padding, and not all at the same place."""
    ids = next(iter(tiny.loader())).clone()
    ids[ids == PAD] = PAD + 1
    for row, length in zip(ids, (5, 9, 17, 17, 12, 3, 17, 8), strict=True):
        row[length:] = PAD
    return ids


def test_mask_fn_is_given_what_the_page_says(tmp_path) -> None:
    """The batch in a Trainer, and its mask may have the last column; elsewhere the arguments of the model's call."""

    class Module(tiny.Module):
        def training_step(self, batch, batch_idx):
            return self.loss(batch["ids"])

    ids = padded()
    expected = int((ids[:, :-1] != PAD).sum())
    often = {"every_n_steps": 1, "background": False}
    batch = lightning_spectral.SpectralRankCallback(
        mask_fn=lambda batch: batch["ids"] != PAD, dirpath=str(tmp_path / "trainer"), **often
    )
    tiny.trainer(tmp_path, [batch], max_steps=1).fit(Module(), DataLoader([{"ids": row} for row in ids], batch_size=8))

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = tiny.Module().gpt

        def forward(self, *, ids):
            return self.gpt(ids)

    gpt, keyword = tiny.Module().gpt, Keyword()
    for name, model, call, mask_fn in (
        ("tuple", gpt, lambda: gpt(ids[:, :-1]), lambda arguments: arguments[0] != PAD),
        ("dict", keyword, lambda: keyword(ids=ids[:, :-1]), lambda arguments: arguments["ids"] != PAD),
    ):
        with lightning_spectral.observe(model, out=tmp_path / name, mask_fn=mask_fn, **often) as probe:
            call().sum().backward()
            probe.step()
    fabric_probe = lightning_spectral.FabricSpectralProbe(
        lightning_spectral.SpectralRankCallback(
            mask_fn=lambda arguments: arguments[0] != PAD, dirpath=str(tmp_path / "fabric"), **often
        )
    )
    fabric, module = Fabric(accelerator="cpu", devices=1, callbacks=[fabric_probe]), tiny.Module().gpt
    wrapped, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.backward(wrapped(ids[:, :-1]).sum())
    optimizer.step()
    for name in ("trainer", "tuple", "dict", "fabric"):
        assert {r.num_tokens for r in read_spectral(tmp_path / name).records if r.step == 0} == {expected}, name
