"""The language model, top to bottom: embed, solve for the equilibrium, score with the tied embedding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from deq_lm.adjoints import Adjoint
from deq_lm.cells.base import Cell
from deq_lm.cells.memory import Memory, Past
from deq_lm.equilibrium import Equilibrium
from deq_lm.heads import LinearHead
from deq_lm.heads.base import SelfInitialized
from deq_lm.learned_start import LearnedStart
from deq_lm.modeling.builders import (
    build_adjoint,
    build_cell,
    build_cell_config,
    build_embedding,
    build_solver,
    build_stopping,
)
from deq_lm.modeling.cache import EquilibriumCache, check_cache
from deq_lm.modeling.configuration_deq_lm import DEQLMConfig
from deq_lm.modeling.generation import EquilibriumGenerationMixin
from deq_lm.modeling.inputs import check_inputs, mask_of_new, unknown_id
from deq_lm.solvers import Solution, StoppingRule
from deq_lm.stack import Stack


@dataclass
class DEQLMOutput(ModelOutput):
    """What a forward pass gives; as a tuple, what the library expects comes first.

    Attributes:
        loss: mean nats per scored target, if targets were given.
        logits: (B, L, V) float32, if asked for.
        past_key_values: the cache of generation, if there is one.
        hidden_states: the embedded tokens, as injected, and f(z*), if asked for.
        last_hidden_state: f(z*), (B, L, D).
        nll_nats: the sum of nats that the loss is the mean of.
        num_targets: how many were scored, a 0-dim int64 tensor.
        target_nats: of each target, 0 where it is not scored, (B, L), if asked for.
        memory: for the next segment.
        solution: facts of the forward solve; None from a stack, which has none.
        jacobian: squared Frobenius norm of df/dz at z* per entry, or its squared spectral norm, estimated and
            differentiable, if asked for.
        start_error: of a learned start, where gradients are recorded; to be added to the loss, see `LearnedStart`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: EquilibriumCache | None = None
    hidden_states: tuple[Tensor, Tensor] | None = None
    last_hidden_state: Tensor | None = None
    nll_nats: Tensor | None = None
    num_targets: Tensor | None = None
    target_nats: Tensor | None = None
    memory: Memory | None = None
    solution: Solution | None = None
    jacobian: Tensor | None = None
    start_error: Tensor | None = None


class DEQLMPreTrainedModel(PreTrainedModel):
    """Initialization and loading, shared by the two model classes."""

    config_class = DEQLMConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    @classmethod
    def from_pretrained(cls, *arguments: Any, use_safetensors: bool | None = None, **options: Any) -> Any:
        """As the library's, from safetensors only: other formats are pickles, which can execute code.

        Raises:
            ValueError: if asked for another format.
            OSError: where there is no other.
        """
        if use_safetensors is False:
            raise ValueError(
                "use_safetensors=False: expected True or nothing. Other formats can execute code when loaded; save the "
                "model with save_pretrained, which writes model.safetensors."
            )
        return super().from_pretrained(*arguments, use_safetensors=True, **options)

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Refused: `recompute` of the cell's configuration is what does it here, since an evaluation is recorded by parts.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "gradient_checkpointing_enable: an equilibrium records a single evaluation of its cell, whatever its depth. To "
            'record less of that, configure the cell with recompute="block" or "feed_forward".'
        )

    activation_checkpointing_enable = gradient_checkpointing_enable  # its name in newer versions of the library

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, SelfInitialized):
            module.reset_parameters()  # guarded by the library: what a checkpoint has brought stays

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what neither a constructor nor a checkpoint has filled.

        The cells come first and here, not in `_init_weights`: the library takes a module for loaded when it has no
        parameter of its own, whatever its children lack. A cell draws all of its parameters, of which those that a
        checkpoint has brought are put back.
        """
        for module in self.modules():
            if isinstance(module, Equilibrium | Stack) and not getattr(module, "_is_hf_initialized", False):
                loaded = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
                if len(loaded) < len(list(module.parameters())):
                    values = [parameter.clone() for parameter in loaded]
                    for part in module.modules():
                        if isinstance(part, Cell | LearnedStart):
                            part.reset_parameters()
                    for parameter, value in zip(loaded, values, strict=True):
                        parameter.copy_(value)
        super().initialize_weights()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *arguments: Any, **options: Any
    ) -> nn.Embedding:
        """As the library's, of an embedding that is one table.

        Raises:
            ValueError: for any other.
        """
        embedding = self.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) with model.embedding={self.config.embedding}: expected 'full', "
                "one table; others cut the vocabulary by frequency, which leaves no place for a new word. Make a new "
                "model of that vocab_size."
            )
        return super().resize_token_embeddings(new_num_tokens, *arguments, **options)


class DEQLMModel(DEQLMPreTrainedModel):
    """Token ids to equilibrium states."""

    def __init__(self, config: DEQLMConfig) -> None:
        super().__init__(config)
        embedding = build_embedding(config.embedding, "model.embedding")
        self.embed_tokens = embedding.make_embedding(config.vocab_size, config.d_model, init_std=config.init_std)
        cell_config = build_cell_config(config.cell, "model.cell")
        self.layers: Equilibrium | Stack
        if config.num_layers is not None and config.depth == "stack":
            self.layers = Stack([build_cell(cell_config) for _ in range(config.num_layers)])
        elif config.num_layers is not None:
            self.layers = Equilibrium.unrolled(build_cell(cell_config), config.num_layers)
        else:
            self.layers = Equilibrium(
                build_cell(cell_config),
                solver=build_solver(config.solver, "model.solver"),
                stopping=build_stopping(config.stopping, "model.stopping"),
                evaluation_stopping=None
                if config.evaluation_stopping is None
                else build_stopping(config.evaluation_stopping, "model.evaluation_stopping"),
                adjoint=build_adjoint(config.adjoint, "model.adjoint"),
                learned_start=None if config.start is None else LearnedStart(config.d_model),
            )
        # The library's protocol: what must stay on one device, and an FSDP unit. It holds a whole solve.
        self._no_split_modules = [type(self.layers).__name__]
        # The library's mark: the cell has drawn its parameters, unless they have no storage yet.
        drawn = not any(parameter.is_meta for parameter in self.layers.parameters())
        self.layers._is_hf_initialized = drawn  # pyright: ignore[reportArgumentType]
        self.is_compiled = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, type(self.embed_tokens))
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        memory: Past | None = None,
        past_key_values: EquilibriumCache | None = None,
        sliding: bool = False,
        stopping: StoppingRule | None = None,
        max_evaluations: int | None = None,
        adjoint: Adjoint | None = None,
        num_unrolled_steps: int | None = None,
        estimate_jacobian: bool = False,
        power_iterations: int | None = None,
        output_hidden_states: bool | None = None,
    ) -> DEQLMOutput:
        """Arguments and errors as `DEQLMForCausalLM.forward`; without loss and logits."""
        start = None
        check_cache(past_key_values, self.config.depth)
        if past_key_values is not None:
            layer, sliding = past_key_values.layer, True
            if layer.memory is not None:
                if memory is not None:
                    raise ValueError(
                        "Give memory or past_key_values that have seen tokens, not both: each is the past."
                    )
                memory, start = layer.memory, layer.start
            attention_mask = mask_of_new(attention_mask, input_ids, layer.get_seq_length())
        check_inputs(input_ids, attention_mask, memory)
        of_a_solve = {"stopping": stopping, "max_evaluations": max_evaluations, "adjoint": adjoint}
        given = [name for name, value in of_a_solve.items() if value is not None]
        if num_unrolled_steps is not None and given:
            raise ValueError(
                f"Give {' and '.join(given)} (of a solve) or num_unrolled_steps (instead of a solve), not both."
            )
        if estimate_jacobian and self.is_compiled:
            raise ValueError(
                "estimate_jacobian after compile_cell: PyTorch cannot differentiate compiled code twice. Do without either."
            )
        try:
            x = self.embed_tokens(input_ids) * self.config.d_model**0.5  # (B, L, D)
        except IndexError as error:  # on a GPU it is the device that complains
            raise unknown_id("input_ids", input_ids, self.config.vocab_size) from error
        key_mask = None if attention_mask is None else attention_mask.bool()
        segment = self.layers(
            x,
            memory,
            key_mask=key_mask,
            sliding=sliding,
            start=start,
            stopping=self._stopping(stopping, max_evaluations),
            adjoint=adjoint,
            num_unrolled_steps=num_unrolled_steps,
            estimate_jacobian=estimate_jacobian,
            power_iterations=power_iterations,
        )
        if key_mask is not None:
            segment = replace(
                segment,
                memory=segment.memory and segment.memory.mark_padding(key_mask),
                past=segment.past and segment.past.mark_padding(key_mask),
            )
        if past_key_values is not None:
            past_key_values.layer.append(input_ids, segment)
        return DEQLMOutput(
            past_key_values=past_key_values,
            hidden_states=(x, segment.output) if output_hidden_states else None,
            last_hidden_state=segment.output,
            memory=segment.memory,
            solution=segment.solution,
            jacobian=segment.jacobian,
            start_error=segment.start_error,
        )

    def _stopping(self, stopping: StoppingRule | None, max_evaluations: int | None) -> StoppingRule | None:
        """The rule with `max_evaluations`, where it is given."""
        if max_evaluations is None:
            return stopping
        if not isinstance(max_evaluations, int) or max_evaluations < 1 or self.config.depth != "equilibrium":
            raise ValueError(
                f"max_evaluations={max_evaluations!r} with depth={self.config.depth}: expected 1 or more evaluations of "
                "the cell, in a model that solves for an equilibrium. Leave it out for the model's own number."
            )
        assert isinstance(self.layers, Equilibrium)
        return replace(stopping or self.layers.current_stopping, max_steps=max_evaluations - 1)


class DEQLMForCausalLM(EquilibriumGenerationMixin, DEQLMPreTrainedModel):
    """A deep equilibrium language model; by `depth` also the weight-tied or the untied network of the same cells."""

    # The loss is a mean over its own targets; a Trainer that accumulates gradients averages it over the batches.
    accepts_loss_kwargs = False

    def __init__(self, config: DEQLMConfig) -> None:
        super().__init__(config)
        self.model = DEQLMModel(config)
        embedding = build_embedding(config.embedding, "model.embedding")
        self.lm_head = embedding.make_head(config.vocab_size, config.d_model, init_std=config.init_std)
        self._tied_weights_keys = {
            f"lm_head.{own}": f"model.embed_tokens.{shared}" for own, shared in self.lm_head.ties.items()
        }
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Takes the weight of an `nn.Linear`, which is what the library makes when it resizes; the head stays."""
        assert isinstance(self.lm_head, LinearHead)
        assert isinstance(new_embeddings, nn.Linear)
        self.lm_head.weight, self.lm_head.out_features = new_embeddings.weight, new_embeddings.out_features

    @property
    def adjoint_solution(self) -> Solution | None:
        """Facts of the latest backward pass's adjoint solve; None before it, or if the adjoint has none."""
        return self.model.layers.adjoint_solution

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        memory: Past | None = None,
        past_key_values: EquilibriumCache | None = None,
        use_cache: bool | None = None,
        sliding: bool = False,
        stopping: StoppingRule | None = None,
        max_evaluations: int | None = None,
        adjoint: Adjoint | None = None,
        num_unrolled_steps: int | None = None,
        estimate_jacobian: bool = False,
        power_iterations: int | None = None,
        return_logits: bool = True,
        return_target_nats: bool = False,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> DEQLMOutput | tuple[Any, ...]:
        """One segment.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), 0 at padding, which is not attended to, here or from the next segment, and whose hidden
                state is 0. Left padding changes nothing for the rest. It says nothing of memory, which brings its own.
            labels: (B, L), the library's convention: the same ids, shifted inside, so the last position is not scored.
            targets: (B, L), the token after each position; -100 is not scored. Use either this or `labels`.
            memory: `DEQLMOutput.memory` of the segment before in the same streams.
            past_key_values: the tokens before these, which are appended; then attention_mask may be that of all of them.
            use_cache: True begins an `EquilibriumCache` where there is none. It slides, see the next.
            sliding: every position sees the `mem_len` positions before it, or all of them in a model without memory, so
                that it does not matter how the text is cut. Otherwise a segment sees all of its memory and of itself.
            stopping: overrides the configured stopping rule.
            max_evaluations: overrides its number of evaluations of the cell, 1 or more: less compute for a worse model.
            adjoint: overrides the configured adjoint.
            num_unrolled_steps: plain evaluations to run and backpropagate through instead of the solve.
            estimate_jacobian: also give `DEQLMOutput.jacobian`, for a regularized loss.
            power_iterations: of that estimate; None is of the Frobenius norm, and 1 or more of the spectral norm.
            return_logits: False saves their memory; the loss is computed in chunks either way.
            return_target_nats: also give `DEQLMOutput.target_nats`, of targets or labels.
            logits_to_keep: only the logits of this many last positions, 0 is all; or indices of the positions, (K,) int64.
            output_hidden_states: also give `DEQLMOutput.hidden_states`.
            return_dict: False gives a tuple of what is not None.
            unsupported: refused, unless None or False.

        Raises:
            ValueError: for arguments that contradict each other or are not supported.
        """
        unsupported.pop("position_ids", None)  # positions are relative
        refused = [name for name, value in unsupported.items() if value is not None and value is not False]
        if refused:
            raise ValueError(
                f"DEQLMForCausalLM got {', '.join(refused)}, which it does not support; it takes input_ids, "
                "attention_mask, labels or targets, memory, past_key_values, use_cache, sliding, stopping, "
                "max_evaluations, adjoint, num_unrolled_steps, estimate_jacobian, power_iterations, return_logits, "
                "return_target_nats, logits_to_keep, output_hidden_states, return_dict."
            )
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep}: expected 0 (all positions) or more, or indices.")
        if use_cache and past_key_values is None:
            past_key_values = EquilibriumCache()
        for name, given in (("labels", labels), ("targets", targets)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name} of shape {tuple(given.shape)} with input_ids of shape {tuple(input_ids.shape)}: expected the "
                    "same shape; a position that is not scored has -100."
                )
        if labels is not None:
            if targets is not None:
                raise ValueError("Give labels (shifted inside) or targets (shifted already), not both.")
            targets = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        hidden = self.model(
            input_ids,
            attention_mask,
            memory=memory,
            past_key_values=past_key_values,
            sliding=sliding,
            stopping=stopping,
            max_evaluations=max_evaluations,
            adjoint=adjoint,
            num_unrolled_steps=num_unrolled_steps,
            estimate_jacobian=estimate_jacobian,
            power_iterations=power_iterations,
            output_hidden_states=output_hidden_states,
        )
        state, embedding, scores = hidden.last_hidden_state, self.model.embed_tokens, {}
        if targets is not None:
            reduction = "none" if return_target_nats else "sum"
            try:
                nats, num_targets = self.lm_head.nll(state, targets, embedding, reduction=reduction)
            except IndexError as error:
                scored = targets.masked_fill(targets == -100, 0)
                raise unknown_id("labels or targets", scored, self.config.vocab_size) from error
            nll_nats = nats.sum()
            if return_target_nats:
                scores["target_nats"] = nats
            loss = nll_nats / num_targets.clamp(min=1)
            scores |= {"loss": loss, "nll_nats": nll_nats, "num_targets": num_targets}
        if return_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            scores["logits"] = self.lm_head.logits(state[:, kept], embedding).float()
        output = DEQLMOutput(**hidden, **scores)
        return output.to_tuple() if return_dict is False else output

    def compile_cell(self, **options: Any) -> None:
        """Compile f, by `torch.compile(**options)`; the solve around it stays as it is, and so does every result.

        It needs a C++ compiler, or on a GPU Triton, and takes its time at the first evaluations of each shape. Jacobian
        regularization is refused from then on: PyTorch cannot differentiate compiled code twice.
        """
        for cell in self.modules():
            if isinstance(cell, Cell):
                cell.compile(**options)
        self.model.is_compiled = True
