"""What a visual-token compressor is, in plain torch.

A compressor never schedules, caches or decodes. It is asked at up to six places what to do with
the visual tokens and answers with a `Selection`; the engine applies that one object to everything
that runs along the sequence (hidden states, position planes, masks, DeepStack features), so
nothing can get out of step. A method that replaces the visual tokens by tokens of its own makes
them in `resample`.

``resample``
    on the vision tower's output: tokens of the method's own instead of the picture's.
``select_vision``
    inside the vision tower, before the projector.
``select_embeds``
    on the visual embeddings, just before the language model.
``mark``
    on the embeddings of the whole prompt: notes per position for later decisions.
``select_prompt``
    on the embeddings of the whole prompt, question included, just before layer 0.
``select_hidden``
    on the output of a decoder layer.
``evict``
    on the KV cache, once the image prefix has been prefilled.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from etcbench.budget import Budget, ModelSpec, check_within, settle
from etcbench.errors import UsageError
from etcbench.options import checked_options
from etcbench.released import KeyMap
from etcbench.selection import Layout, Selection, top_mask
from etcbench.states import LayerState, PromptState, Questions, Resampled, VisionStates

if TYPE_CHECKING:
    from typing import Self

    from etcbench.branch import Branch, Speculation
    from etcbench.costs import Case

__all__ = [
    "Budget",
    "Compressor",
    "DecodePositions",
    "LayerState",
    "ModelSpec",
    "Numbering",
    "PromptLayout",
    "Reuse",
    "VisionStates",
    "check_within",
    "top_mask",
]

Reuse = Literal["prefix", "layers", "tokens", "vision"]
PromptLayout = Literal["standard", "image_first", "marker_first"]
Numbering = Literal["keep", "reindex"]
DecodePositions = Literal["prompt", "layer"]


@dataclass(eq=False)
class Compressor:
    """One method with its options; subclass it, set the class variables, answer the hooks.

    Class attributes
    ----------------
    takes_budget : bool
        False for methods that are the same at every budget.
    query_aware : bool
        Whether the kept set depends on the question.
    trained : bool
        Whether the method needs weights of its own; `needs_weights` where that is up to an option.
    any_budget : bool
        Whether weights trained at one budget serve every other.
    resamples : bool
        Whether `resample` makes the visual tokens.
    released : KeyMap or None
        Names in the checkpoints that the method's authors released.
    """

    takes_budget: ClassVar[bool] = True
    uses_image: ClassVar[bool] = True
    query_aware: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    any_budget: ClassVar[bool] = False
    resamples: ClassVar[bool] = False
    released: ClassVar[KeyMap | None] = None

    budget: Budget | None = None
    # Backbone weights that training changed, by parameter name; filled from a checkpoint.
    tuned: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, kw_only=True)

    @classmethod
    def from_budget(cls, budget: Budget | None, spec: ModelSpec, **options: Any) -> Self:
        """Build the method for a budget on a backbone.

        Parameters
        ----------
        budget : Budget or None
            None for methods without one and where the options say it.
        spec : ModelSpec
            The backbone.
        **options
            The method's own.

        Raises
        ------
        BudgetError
            If the method cannot serve this budget on this backbone; says which it can.
        UsageError
            If an option does not exist, or its value does not fit.
        """
        known = {option.name for option in fields(cls) if option.init and option.name != "budget"}
        if unknown := set(options) - known:
            listed = ", ".join(sorted(known)) or "none"
            raise UsageError(
                f"{cls.name()} has no option {', '.join(sorted(unknown))}; its options: {listed}"
            )
        if cls.takes_budget and not (budget is None and cls.budget_in(options)):
            if budget is None:
                raise UsageError(f"{cls.name()} needs a budget: add --tokens N")
            budget = settle(budget, spec, cls)
            cls.check_budget(budget, spec)
        chosen = checked_options(cls, cls.name(), options)
        method = cls(budget=budget if cls.takes_budget else None, **chosen)
        method.prepare(spec)
        return method

    @classmethod
    def budget_in(cls, options: dict[str, Any]) -> bool:
        """Whether options alone say how many tokens are kept, so that no budget is needed."""
        return False

    @classmethod
    def needs_weights(cls, options: dict[str, Any]) -> bool:
        """Whether the method needs trained weights with these options."""
        return cls.trained

    @classmethod
    def check_budget(cls, budget: Budget, spec: ModelSpec) -> None:
        """Refuse a budget above the visual tokens of a backbone that has a fixed number.

        Raises
        ------
        BudgetError
            Says which budgets can be served.
        """
        check_within(budget, spec)

    @classmethod
    def name(cls) -> str:
        """Public name: the name of the file that defines the method."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    def prepare(self, spec: ModelSpec) -> None:
        """Check the budget against a backbone and derive what depends on both."""

    @property
    def prompt_layout(self) -> PromptLayout:
        """Order of the prompt's parts (spec abstractive 1.4, 2.2)."""
        return "standard"

    @property
    def separate_turns(self) -> bool:
        """Whether the turns of a conversation are trained apart, each with tokens of its own."""
        return False

    @property
    def reuse(self) -> Reuse:
        """What of a picture's work serves every question on it.

        ``"prefix"``: the whole compressed prefix; ``"layers"``: the layers below `shared_layers`;
        ``"tokens"``: the visual tokens; ``"vision"``: the vision tower's output.
        """
        return "prefix"

    @property
    def numbering(self) -> Numbering:
        """Positions behind `select_hidden`: the survivors' own, or anew (spec selective 1.7)."""
        return "keep"

    @property
    def decode_positions(self) -> DecodePositions:
        """Where a generated token stands after renumbering.

        ``"prompt"``: behind the uncompressed prompt in every layer; ``"layer"``: behind what each
        layer itself holds.
        """
        return "prompt"

    @property
    def shared_layers(self) -> int:
        """Decoder layers that do not depend on the question (for ``reuse = "layers"``)."""
        return 0

    @property
    def module(self) -> nn.Module | None:
        """Parameters of the method's own, or None."""
        return None

    def attach(self, backbone: Any) -> None:
        """Take from a loaded backbone what `prepare` could not know; called again, do nothing.

        Parameters
        ----------
        backbone : etcbench.backbones.Backbone
            The model that the method will run on.
        """

    @property
    def branch(self) -> Branch | None:
        """Decoder layers of the method's own, beside the backbone's, or None.

        They run on the uncompressed output of layer ``branch.start - 1``; with ``reuse = "layers"``
        that is the last of the `shared_layers`. Known once `attach` was called.
        """
        return None

    @property
    def speculation(self) -> Speculation | None:
        """How the branch drafts answers for the model to verify; None decodes token by token.

        Either way the answer is the same.
        """
        return None

    def training_module(self, spec: ModelSpec) -> nn.Module | None:
        """Auxiliary loss that exists only while training, or None.

        Its ``layer`` says how many decoder layers run before the states that it wants, and its
        ``second_pass`` that it wants one by the model (``"own"``) or a copy of its initial weights
        (``"initial"``). It is called with the `PackedBatch` and `PassStates`, and returns ``loss``,
        weighted, with figures to log. Its buffer ``started`` says whether it has seen a batch.
        """
        return None

    def objective(self, model: Any, batch: Any) -> dict[str, Tensor] | None:
        """Compute the whole training loss of a method that is not trained by answers' CE alone.

        Parameters
        ----------
        model : etcbench.training.CompressionModel
            Backbone and method.
        batch : etcbench.packing.PackedBatch
            Pictures and packed turns.

        Returns
        -------
        dict of str to Tensor or None
            ``loss`` and its parts for the log; None for the standard loss.
        """
        return None

    def training_example(self, state: PromptState) -> dict[str, Tensor] | None:
        """Note what the method learns from a prompt, once, before it trains on it many times.

        Parameters
        ----------
        state : PromptState
            Prompts that the model answers as the data do; ``relevance`` is that of this answer.

        Returns
        -------
        dict of str to Tensor or None
            Tensors of shape (batch, ..., tokens), which `objective` gets back in batches of its
            own; None for methods that train on pictures and turns.
        """
        return None

    def schedule(self, visual_tokens: int, layers: int) -> list[int]:
        """Visual tokens at the input of each decoder layer; the budget by default, else all.

        Parameters
        ----------
        visual_tokens : int
            Tokens of one uncompressed picture.
        layers : int
            Decoder layers.
        """
        return [self.budget.of(visual_tokens) if self.budget else visual_tokens] * layers

    def image_grid(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Raster to which the picture itself is reduced before the tower, or None to leave it."""
        return None

    def resample(self, vision: VisionStates, questions: Questions) -> Resampled:
        """Make the visual tokens, if `resamples`, from the tower's output.

        Parameters
        ----------
        vision : VisionStates
            Output of the tower. With ``reuse = "vision"`` a picture stands there once for each
            question on it.
        questions : Questions
            The question on each picture; only a method with ``reuse = "vision"`` may read it.

        Returns
        -------
        Resampled
            The tokens of each picture, ready for the decoder.
        """
        raise NotImplementedError(f"{self.name()} says that it resamples, but does not")

    def select_vision(self, vision: VisionStates) -> Selection | None:
        """Choose or merge tower tokens before the projector.

        None keeps the backbone's own choice (all patches, no CLS).
        """
        return None

    def select_embeds(self, embeds: Tensor, grid: Tensor, keys: list[str]) -> Selection | None:
        """Choose or merge visual embeddings, shape (pictures, tokens, hidden), before layer 0."""
        return None

    def learned_tokens(self) -> Tensor | None:
        """Embeddings, shape (M, hidden), that follow the visual tokens; None for no such tokens."""
        return None

    def attends(self, query: Layout, key: Layout) -> Tensor | None:
        """Restrict attention beyond causality.

        Returns
        -------
        Tensor or None
            Bool, shape (batch, queries, keys), True = may attend; None for no restriction.
        """
        return None

    def number(self, layout: Layout) -> Tensor | None:
        """Give positions other than the backbone's, shape (planes, batch, tokens), before layer 0.

        What follows later still continues from the backbone's.
        """
        return None

    def mark(self, embeds: Tensor, layout: Layout) -> Tensor | None:
        """Note something about each position of the embedded prompt for `select_hidden`.

        Parameters
        ----------
        embeds : Tensor, shape (batch, tokens, hidden)
            Input of layer 0.
        layout : Layout
            What each position is.

        Returns
        -------
        Tensor or None
            Shape (batch, tokens).
        """
        return None

    def select_prompt(self, state: PromptState) -> Selection | None:
        """Choose positions of the embedded prompt before layer 0; None leaves it alone.

        For methods whose choice needs the question (``reuse = "layers"``, no shared layer); the
        others have `select_embeds`.
        """
        return None

    def select_hidden(self, state: LayerState) -> Selection | None:
        """Choose or merge positions after a decoder layer; None leaves the sequence alone."""
        return None

    def evict(self, layout: Layout) -> Selection | None:
        """Choose what stays in the KV cache once the image prefix is prefilled."""
        return None

    # What it costs ----------------------------------------------------------------------------

    def own_macs(self, case: Case) -> int:
        """Count the multiply-accumulates of the method's own work for one question.

        Everything beside the backbone's tower, projector and decoder layers: attention rows,
        similarities, networks of the method's own. The decoder follows from `schedule`,
        `learned_tokens` and `evict`; a method without further products leaves this at 0. The tests
        hold it to what `torch.utils.flop_counter` counts.

        Parameters
        ----------
        case : etcbench.costs.Case
            Sizes, and the prices of attention rows (``case.score_rows``, ``case.tower.scores``).
        """
        return 0

    def projected(self, tokens: int) -> int:
        """Count the tokens that pass the backbone's projector: all patches by default.

        A method that selects in front of it (`select_vision`) says how many are left of
        ``tokens``. One that `resamples` takes the projector's place unless it says otherwise, and
        counts its own in `own_macs`.
        """
        return 0 if self.resamples else tokens
