"""kNN-LM (arXiv:1911.00172): p = l p_kNN + (1 - l) p_LM, where p_kNN is what followed the nearest states of a text.

The key is what the last feed-forward of the decoder reads (section 3), distances are squared and Euclidean, and
p_kNN(y) is proportional to the sum of exp(-d / T) over the neighbours that y followed (equation 2; T is 1 there).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.generation.perplexity import Block, check_ids, predicted
from lamina.model import Model
from lamina.retrieve.database import Database
from lamina.retrieve.embedding import fingerprint
from lamina.retrieve.states import watched


class KnnLM:
    """A causal model beside a database of its states; `lamina index build --states` makes one."""

    def __init__(
        self,
        model: Model,
        database: Database,
        *,
        count: int = 1024,
        weight: float = 0.25,
        temperature: float = 1.0,
    ) -> None:
        """count: neighbours of each token. weight: l, how much of the probability is theirs. temperature: T; a state
        is as long as its model makes it, so the right one differs by model.

        Raises LaminaError for a database of other states than this model's, and values out of range.
        """
        known = database.spec.embedder
        if known.pooling != "state":
            raise LaminaError(
                f"{database.directory}: holds chunks, made by {known.source}; kNN-LM needs states of the model itself:"
                " build it with --states"
            )
        found = fingerprint(model, database.spec.tokenizer)
        if found != known.hash:
            raise LaminaError(
                f"{database.directory}: holds states of {known.source} in {known.dtype} ({known.hash[:12]}...); this"
                f" model is another one, or in another dtype ({found[:12]}...)"
            )
        if not 0 <= weight <= 1 or not 0 < temperature < float("inf"):
            raise LaminaError(f"weight is {weight} and temperature {temperature}; 0 to 1, and above 0, are needed")
        self.model, self.database, self.count = model, database, count
        self.weight, self.temperature = weight, temperature

    def neighbours(self, states: Tensor, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States (n, width) -> the tokens that followed the nearest ones (n, count), and the share of each of them
        (n, count) float32; -1 and 0 for none. exclude: (spans, 2) documents that are not to be found."""
        spans = None if exclude is None else exclude.expand(len(states), -1, -1)
        found = self.database.search(states, self.count, spans)
        shares = (-found.distances / self.temperature).softmax(dim=1).nan_to_num()  # nan: none was found at all
        tokens = self.database.store.tokens(found.rows.clamp(min=0).reshape(-1)).reshape(found.rows.shape)
        return tokens.masked_fill(found.rows < 0, -1), shares

    def probabilities(self, states: Tensor, exclude: Tensor | None = None) -> Tensor:
        """p_kNN: states (n, width) -> (n, vocabulary) float32."""
        tokens, shares = self.neighbours(states, exclude)
        out = torch.zeros(len(states), self.model.spec.embedding.vocabulary)
        return out.scatter_add(1, tokens.clamp(min=0), shares)

    def mixed(self, states: Tensor, log_probabilities: Tensor, target: Tensor, exclude: Tensor | None) -> Tensor:
        """log p of the targets (n,), whose log p_LM is (n,)."""
        tokens, shares = self.neighbours(states, exclude)
        of_neighbours = (shares * (tokens == target[:, None])).sum(1).double()
        mixture = self.weight * of_neighbours + (1 - self.weight) * log_probabilities.double().exp()
        return mixture.log().float()

    def block(self, exclude: Tensor | None = None) -> Block:
        """What `score` and `measure` of `lamina.generation` read a window with: `measure(model, ids, block=...)`.

        exclude: (spans, 2), documents of the database that are not to be found, as those of the text itself.
        """
        return partial(self._block, exclude)

    @torch.inference_mode()
    def _block(self, exclude: Tensor | None, model: Any, ids: list[int], fresh: int) -> Tensor:
        assert model is self.model
        tensor = torch.tensor([ids], device=self.model.embedding.weight.device)
        check_ids(self.model, ids)
        first = max(len(ids) - fresh, 1)
        with watched(self.model) as seen:
            hidden = self.model(tensor, keep_logits=0).hidden[0, first - 1 : -1]
        plain = predicted(self.model, hidden, tensor[0, first:])[0].cpu()
        return self.mixed(seen[-1][0, first - 1 : -1].float().cpu(), plain, tensor[0, first:].cpu(), exclude)
