"""Scripts by what happens between the table and the blocks, and by the order in which blocks run."""

from __future__ import annotations

import concurrent.futures

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.scripts import toys
from tests.scripts.harness import Script
from tests.scripts.toys import Lit, Tokens, cross_entropy


class Embeds(toys.Decoder):
    """What happens between table and blocks is the subclass's."""

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.between(self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x)
        return x


def with_decoder(kind: type[nn.Module], base: type[Lit] = Tokens) -> type[Lit]:
    class Of(base):  # type: ignore
        def make(self) -> nn.Module:
            model = toys.LM()
            model.model = kind()
            return model

    return Of


class Unwatched(Lit):
    """A module that runs twice in a call has two records: the harness's count is another question."""

    def watched(self) -> None:
        """Nothing."""


class HeavyDropout(Embeds):
    def between(self, x):
        return F.dropout(x, 0.5, self.training)


class Gemma(Embeds):
    def between(self, x):
        return x * toys.D**0.5


class Normed(Embeds):
    def __init__(self):
        super().__init__()
        self.first = nn.LayerNorm(toys.D)

    def between(self, x):
        return self.first(x)


class Noisy(Embeds):
    """NEFTune."""

    def __init__(self):
        super().__init__()
        self.embed_tokens.register_forward_hook(lambda m, a, out: out + torch.zeros_like(out).uniform_(-0.1, 0.1))


class Projected(Embeds):
    """A factorised table."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.into = nn.Embedding(toys.V, 8), nn.Linear(8, toys.D)

    def between(self, x):
        return self.into(x)


class Sinusoidal(Embeds):
    def between(self, x):
        at = torch.arange(x.shape[1])[:, None] / 10 ** (torch.arange(toys.D) / 4)
        return x + at.sin()


class BigPositions(Embeds):
    """Positions of ten times the tokens' length."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(10 * torch.randn(toys.T, toys.D))

    def between(self, x):
        return x + self.positions[: x.shape[1]]


class ZeroEmbedding(Embeds):
    """padding_idx is also a token of the text; dropout; positions."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(toys.V, toys.D, padding_idx=0)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        with torch.no_grad():
            self.embed_tokens.weight[0] = 0
        self.positions = nn.Parameter(0.02 * torch.randn(toys.T, toys.D))

    def between(self, x):
        return F.dropout(x + self.positions[: x.shape[1]], 0.1, self.training)


class UNet(Embeds):
    """First half, then second half with skips, as in speedruns."""

    def __init__(self):
        super().__init__(n=4)
        self.skip = nn.Parameter(torch.ones(2))

    def forward(self, ids):
        x, kept = self.embed_tokens(ids), []
        for n in range(2):
            x = self.layers[n](x)
            kept.append(x)
        for n in range(2, 4):
            x = self.layers[n](x + self.skip[n - 2] * kept.pop())
        return x


class OutOfOrder(Embeds):
    def forward(self, ids):
        x = self.embed_tokens(ids)
        for n in (1, 0):
            x = self.layers[n](x)
        return x


class Depths(Embeds):
    """Mixture of depths: the second block sees half of the tokens."""

    def forward(self, ids):
        x = self.layers[0](self.embed_tokens(ids))
        chosen = x[..., 0].topk(x.shape[1] // 2, dim=1).indices.sort(1).values[..., None].expand(-1, -1, toys.D)
        return x.scatter(1, chosen, self.layers[1](x.gather(1, chosen)))


class Parts(Embeds):
    """Halves of the batch one after the other."""

    def forward(self, ids):
        return torch.cat([super(Parts, self).forward(part) for part in ids.chunk(2)])


class Looped(Embeds):
    """All blocks twice, ids embedded again before the second time."""

    def forward(self, ids):
        x = super().forward(ids)
        for layer in self.layers:
            x = layer(x + self.embed_tokens(ids))
        return x


class Threads(Embeds):
    """Halves of the batch in threads."""

    def forward(self, ids):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return torch.cat([pool.submit(super(Threads, self).forward, part).result() for part in ids.chunk(2)])


class ChunkedNetwork(nn.Module):
    def __init__(self, mlp, of_chunk):
        super().__init__()
        self.gate_proj, self.down_proj = mlp.gate_proj, mlp.down_proj
        self.of_chunk = of_chunk

    def forward(self, x):
        parts = []
        for n, part in enumerate(x.chunk(4, 1)):
            self.of_chunk(n)
            parts.append(self.down_proj(F.silu(self.gate_proj(part))))
        return torch.cat(parts, 1)


class Chunks(Tokens):
    def make(self):
        model = toys.LM()
        for layer in model.model.layers:
            layer.mlp = ChunkedNetwork(layer.mlp, self.of_chunk)
        return model

    def of_chunk(self, n):
        self.row_ids = self.tokens.chunk(4, 1)[n]

    def loss(self, ids):
        self.tokens = ids[:, :-1]
        return cross_entropy(self.net(self.tokens), ids[:, 1:])


class Downsampled(Lit):
    """Bytes in patches of four: a convolution between table and blocks."""

    def __init__(self):
        super().__init__()
        self.pool = nn.Conv1d(toys.D, toys.D, 4, 4)

    def training_step(self, batch, batch_idx):
        x = self.pool(self.net.model.embed_tokens(batch[:, :-1]).mT).mT
        for layer in self.net.model.layers:
            x = layer(x)
        return self.net.lm_head(x).square().mean()


class Codebooks(Lit):
    """Two codes a place, their embeddings added (audio)."""

    def __init__(self):
        super().__init__()
        self.second = nn.Embedding(toys.V, toys.D)

    def training_step(self, batch, batch_idx):
        x = self.net.model.embed_tokens(batch[:, :8]) + self.second(batch[:, 8:16])
        for layer in self.net.model.layers:
            x = layer(x)
        return cross_entropy(self.net.lm_head(x), batch[:, 1:9])


class SharedTower(Lit):
    """Queries and documents of other lengths through one tower, in-batch negatives."""

    def training_step(self, batch, batch_idx):
        self.row_ids = batch[:, :6]
        query = self.net.model(batch[:, :6]).mean(1)
        self.row_ids = batch[:, 6:16]
        document = self.net.model(batch[:, 6:16]).mean(1)
        return F.cross_entropy(query @ document.T, torch.arange(len(batch)))


SCRIPTS = {
    **{
        name: Script(with_decoder(kind))
        for name, kind in {
            "heavy dropout": HeavyDropout,
            "Gemma's scale": Gemma,
            "normed embedding": Normed,
            "NEFTune": Noisy,
            "factorised table": Projected,
            "sinusoidal": Sinusoidal,
            "large positions": BigPositions,
            "padding is a token": ZeroEmbedding,
            "U-Net": UNet,
            "out of order": OutOfOrder,
            "mixture of depths": Depths,
        }.items()
    },
    "threads": Script(with_decoder(Threads, Lit)),
    "halves of the batch": Script(with_decoder(Parts, Lit)),
    "looped": Script(with_decoder(Looped, Unwatched)),
    "chunked network": Script(Chunks),
    "downsampled": Script(Downsampled, losses=False),
    "two codebooks": Script(Codebooks),
    "shared tower": Script(SharedTower, losses=False),
}
