"""Which matrices are output layers: known by ownership, by name and by place, never from a number alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from lightning_spectral.models.layouts import is_convolution, is_linear
from lightning_spectral.models.names import clean_name
from lightning_spectral.models.places import Place
from lightning_spectral.optim.owners import NamedParameter

# output layers, and modules that end in one
_HEAD = re.compile(
    r"^(lm_heads?|heads?|head_dist|classifier|unembed\w*|(to_)?logits(_\w+)?|embed_out|score|qa_outputs|cls"
    r"|output_projection|codebooks_head|\w+_lm_head|(?!pre_)\w+_classifier)$"
)
# those that a repeated block may have (multi-token prediction), where they are as wide as the tokens
_INNER_HEAD = re.compile(r"^(lm_heads?|heads?|unembed\w*|(to_)?logits|embed_out|output_projection)$")
# outside of blocks only
_OUTER_HEAD = re.compile(
    r"^((\w+_)?(answer|audio|auxiliary|bbox|box|class|classification|cls|ctc|decode|dist|generation|image|itm|mim|mlm|mlp|output"
    r"|policy|prediction|regression|reward|score|segmentation|text|value|vision)_heads?|tail"
    r"|\w*(class|bbox)_embed|(class|bbox|box|mask)_predictor|logit_fc|seq_relationship)$"
)
_OUTPUT = re.compile(r"(^|_)out(put)?(_proj|_layer)?$|^decoder$")  # how a head calls its last layer, wherever it stands
# what many layers are called; a head where nothing follows in the whole model
_LAST = re.compile(r"^(fc|fc_out|final|final_layer|readout|summary|ctc_proj)$")
_TRANSFORMS_FIRST = re.compile(r"^(heads?|\w*lm_head)$")  # their decoder may stand elsewhere
_POSITIONS = re.compile(
    r"(^|[._])(pos\w*|wpe|\w*position\w*|\w*type\w*|seg\w*|time\w*|level\w*)($|[._])", re.IGNORECASE
)
_LISTS = (nn.ModuleList, nn.ModuleDict)


class Heads:
    """What is known about output layers before single parameters are looked at."""

    def __init__(self, named: Sequence[NamedParameter]) -> None:
        self._owned: set[int] = set()  # weights that the model itself calls its output embeddings
        self._declared: set[int] = set()  # modules inside a model that says what its output embeddings are
        self._answered: set[int] = set()  # of those the modules of a model that has some
        self._vocabularies: dict[int, set[int]] = {}  # id of the root -> rows of its token tables
        self._last: dict[int, str] = {}  # id of the root -> its last linear layer
        # (id of the root, path of a module, "" for itself) -> its last linear layer or convolution
        self._last_of_any: dict[tuple[int, str], str] = {}
        self._modules: dict[tuple[int, str], nn.Module] = {}
        self._order: dict[tuple[int, str], int] = {}  # of all layers
        self._last_place: dict[int, int] = {}  # id of the root -> the last layer but of auxiliary losses
        for root in {id(one.places[0].root): one.places[0].root for one in named}.values():
            self._ask(root)
            self._walk(root)

    def _ask(self, root: nn.Module) -> None:
        for module in root.modules():
            ask = getattr(type(module), "get_output_embeddings", None)
            if ask is None:
                continue
            inside = [id(child) for child in module.modules()]
            self._declared.update(inside)
            try:
                weight = getattr(ask(module), "weight", None)
            except Exception:  # noqa: S112 - a foreign method; some models have none and say so by raising
                continue
            if weight is not None:
                self._owned.add(id(weight))
                self._answered.update(inside)

    def _walk(self, root: nn.Module) -> None:
        for raw, module in root.named_modules(remove_duplicate=False):
            path = clean_name(raw)
            self._modules[id(root), path] = module
            if isinstance(module, nn.Embedding) and not _POSITIONS.search(path):
                self._vocabularies.setdefault(id(root), set()).add(module.num_embeddings)
            linear = is_linear(module)
            if not linear and not is_convolution(module):
                continue
            self._order[id(root), path] = len(self._order)
            parts = path.split(".")
            if not any(part.startswith("aux") for part in parts):
                self._last_place[id(root)] = self._order[id(root), path]
            for depth in range(len(parts)):
                self._last_of_any[id(root), ".".join(parts[:depth])] = path
            if linear:
                self._last[id(root)] = path

    def reason(self, one: NamedParameter) -> str | None:
        """Why this matrix is a head; None when it is none."""
        if id(one.param) in self._owned:
            return "output embeddings"
        as_wide = one.shape[0] in self._vocabularies.get(id(one.places[0].root), set())
        if any(self._is_named_head(each, as_wide) for each in one.places):
            return "head by name"
        place = one.places[0]
        if not self._is_last(place) or place.in_block:
            return None
        if as_wide and id(place.module) not in self._declared:
            return "last layer, as wide as the tokens"
        if _LAST.match(place.path.rpartition(".")[2]) and id(place.module) not in self._answered:
            return "last layer, by name"
        return None

    def _is_last(self, place: Place) -> bool:
        return self._last.get(id(place.root)) == place.path

    def _is_named_head(self, place: Place, as_wide: bool) -> bool:
        """A layer called a head, or the last layer of something called so (every layer of a list called so)."""
        last = place.path.rpartition(".")[2]
        leaf = not place.module._modules.keys() - {"parametrizations"}
        if leaf and _HEAD.match(last):
            return not place.in_block or (as_wide and bool(_INNER_HEAD.match(last)))
        if leaf and _OUTER_HEAD.match(last) and not place.in_block:
            return True
        return self._ends_a_head(place)

    def _ends_a_head(self, place: Place) -> bool:
        """Whether this is the last layer of a module called a head, with nothing but lists and sequences between."""
        parts = place.path.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            name, container = parts[depth - 1], self._modules[id(place.root), ".".join(parts[:depth])]
            if _is_called_head(name):
                if place.in_block and any(part.isdecimal() for part in parts[:depth]):
                    return False
                if isinstance(container, _LISTS):
                    return self._end_of(place, ".".join(parts[: depth + 1])) == place.path
                return self._end_of(place, ".".join(parts[:depth])) == place.path and not self._is_followed(place, name)
            one_of_heads = name.isdecimal() and depth > 1 and _is_called_head(parts[depth - 2])
            if not (one_of_heads or isinstance(container, (nn.Sequential, *_LISTS))):
                return False
        return False

    def _end_of(self, place: Place, path: str) -> str:
        """The last layer of the module at a path: one that is called so, else the last to be registered."""
        root = id(place.root)
        children = self._modules[root, path]._modules
        if any(_is_called_head(name) for name in children):
            return ""
        called = [name for name, child in children.items() if child is not None and _OUTPUT.search(name)]
        if len(called) == 1 and (root, f"{path}.{called[0]}") in self._order:
            return f"{path}.{called[0]}"
        return self._last_of_any.get((root, path), place.path)

    def _is_followed(self, place: Place, name: str) -> bool:
        """Whether what ends here is a last transformation before a decoder that stands elsewhere."""
        if not _TRANSFORMS_FIRST.match(name):
            return False
        root, order = id(place.root), self._order.get((id(place.root), place.path), 0)
        later = name in ("head", "heads") and order < self._last_place.get(root, -1)
        return later or id(place.module) in self._answered


def _is_called_head(name: str) -> bool:
    return bool(_HEAD.match(name) or _OUTER_HEAD.match(name))
