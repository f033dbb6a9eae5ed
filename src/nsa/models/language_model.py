"""The forward of a language model: a decoding step by itself, logits, or the loss of hidden states."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from nsa.models.cache import NSALlamaCache
from nsa.models.captured_step import CapturedStep
from nsa.models.context import whole_count
from nsa.models.generation import GenerationPolicy
from nsa.models.loss import lm_loss_of_logits, takes_hidden_states


class SparseCausalLM(GenerationPolicy):
    """generate() and the loss of a language model whose decoder is a `SparseDecoder`; a mixin like it."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        weights: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Llama's, and:

        * In training, with labels, `logits` are None: the loss takes hidden states, some tokens at a time
          (`nsa.models.loss`), so that the logits of a large vocabulary are never all in memory.
        * `weights` [b, t] say how much each label counts in the loss.
        """
        if isinstance(past_key_values, NSALlamaCache) and past_key_values.cuda_graphs:
            is_step = input_ids is not None and input_ids.shape[1] == 1 and past_key_values.is_step(1)
            # What asks for more than logits goes through the modules.
            more = any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
            more = more or self.config.output_hidden_states or not kwargs.get("return_dict", self.config.return_dict)
            if is_step and labels is None and not more:
                assert input_ids is not None
                logits = self._captured_step(past_key_values, input_ids, attention_mask)(input_ids, attention_mask)
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        if weights is not None and labels is None:
            raise ValueError("weights: expected labels, which they weigh, beside them; got none")
        forward = super().forward if labels is None else self._forward_with_loss
        extra = {} if labels is None else {"labels": labels, "weights": weights}
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            logits_to_keep=logits_to_keep, **extra, **kwargs,
        )  # fmt: skip

    def _captured_step(self, cache: NSALlamaCache, input_ids: Tensor, attention_mask: Tensor | None) -> CapturedStep:
        """The cache's own, as long as it serves."""
        step: CapturedStep | None = cache.captured_step
        if step is None or step.model is not self or not step.serves(input_ids, attention_mask):
            step = cache.captured_step = CapturedStep(self, cache, masked=attention_mask is not None)
        return step

    @can_return_tuple
    def _forward_with_loss(
        self, labels: Tensor, weights: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        if self.model.context is not None:
            kwargs["num_items_in_batch"] = whole_count(self.model.context, kwargs)
        of_loss = {name: kwargs[name] for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        wants_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if self.training and wants_all and takes_hidden_states(self, kwargs):
            out, logits = self.model(**kwargs), None
            loss = self.chunked_loss(out.last_hidden_state, self.lm_head.weight, labels, weights=weights, **of_loss)
        elif weights is None:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        else:
            out = super().forward(logits_to_keep=logits_to_keep, **kwargs)
            logits = out.logits
            loss = lm_loss_of_logits(logits, labels, weights=weights, **of_loss)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states,
            attentions=out.attentions,
        )  # fmt: skip
