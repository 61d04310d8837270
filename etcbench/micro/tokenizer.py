"""The micro models' tokenizer: byte-level, lossless, short.

Every word of the micro world is one token (with its leading space); everything else falls back to
bytes, so nothing is ever unknown. The standing sentences of LLaVA's prompt are single tokens: a
picture has 64 tokens here instead of 576, and unless the text shrinks too, it outweighs the
picture.
"""

from __future__ import annotations

from itertools import product

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from etcbench.micro.artwork import sprites
from etcbench.micro.choices import CHINESE, LETTER, LETTER_ZH, ONE_OF
from etcbench.micro.questions import BOX, LOCATE, SHORT
from etcbench.micro.stream import TurnStream

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
# The first sentence ends before its full stop because VoCo-LLaMA's variant goes on there with
# "of the image" (spec abstractive 2.2). No phrase holds a newline: LLaVA's lines stay lines.
LLAVA_PHRASES = (
    SYSTEM[: SYSTEM.index(".")],
    SYSTEM[SYSTEM.index(".") :],
    " USER:",
    "USER:",
    " ASSISTANT:",
)
SENTENCES = (
    SHORT.strip(),
    LETTER,
    LETTER_ZH,
    ONE_OF,
    BOX.strip(),
    "Please answer yes or no.",
    "图片的背景是什么颜色？",
    "图片中有几个物体？",
    "的物体属于哪一类？",
    "图片",
    *CHINESE.values(),
)
PHRASES = (*LLAVA_PHRASES, *SENTENCES)
# Qwen3-VL's own: end of text (padding), the turn's two ends, and what marks a picture or a video.
QWEN_PAD, TURN, QWEN_EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
QWEN_SPECIAL = (QWEN_PAD, TURN, QWEN_EOS, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
QWEN_PHRASES = ("user\n", "assistant\n", "system\n", *LOCATE, ' [{"bbox_2d": [', "]}]")
QWEN_SHAPES = ((2, 2), (2, 3), (3, 2), (1, 2), (2, 1))
CORPUS_SEED = 20_000
CORPUS_SAMPLES = 600


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    # A regular plural is its singular and an ending: what is learned about " cat" then holds for
    # " cats".
    names = "|".join(
        sorted({sprite.name for sprite in sprites()}, key=lambda name: (-len(name), name))
    )
    pattern = (
        rf" (?:{names})(?=e?s\b)"
        r"| ?[01]\.\d"  # a box coordinate is two tokens: tenths, then hundredths
        r"| ?\p{L}+| ?\p{N}|\n| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _vocabulary(
    pre_tokenizer: pre_tokenizers.PreTokenizer, shapes: tuple[tuple[int, int], ...] = ()
) -> list[str]:
    stream = TurnStream(CORPUS_SEED, blind_share=0, shapes=shapes)
    texts = [
        f"{question} {answer}"
        for index in range(CORPUS_SAMPLES)
        for question, answer in stream.sample(index)["turns"]
    ]
    # What a finite corpus may miss: every name, plural and word, plain and after a space.
    for sprite in sprites():
        texts += [f" {sprite.name} {sprite.plural} {sprite.category}"]
        texts += [f"{sprite.word} {sprite.word}"] if sprite.word else []
    texts += [f"{space}{one}.{tenth}" for space, one, tenth in product(("", " "), "01", range(10))]
    found: set[str] = set()
    for text in texts:
        for phrase in PHRASES:
            text = text.replace(phrase, "\n")
        found.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    return sorted(piece for piece in found if len(piece) > 1)


def _lossless(
    special: tuple[str, ...],
    phrases: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...] = (),
) -> Tokenizer:
    """Build a vocabulary: special tokens, bytes, every word of the micro world, phrases."""
    pre_tokenizer = _pre_tokenizer()
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += _vocabulary(pre_tokenizer, shapes)
    # With `ignore_merges` a piece in the vocabulary is one token and any other is its bytes, so no
    # entry is spent on the steps of a merge.
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


def build_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Build micro-qwen3vl's tokenizer: the same words, Qwen3-VL's special tokens, no BOS."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_lossless(QWEN_SPECIAL, (*SENTENCES, *QWEN_PHRASES), QWEN_SHAPES),
        eos_token=QWEN_EOS,
        pad_token=QWEN_PAD,
        extra_special_tokens={
            "image_token": IMAGE_PAD,
            "video_token": VIDEO_PAD,
            "vision_bos_token": VISION_START,
            "vision_eos_token": VISION_END,
            "turn_token": TURN,
        },
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; the same one every time.

    Returns
    -------
    PreTrainedTokenizerFast
        ``<s>`` is put in front by default; ``decode(encode(x))`` gives back any text.
    """
    tokenizer = _lossless((PAD, BOS, EOS, IMAGE), PHRASES)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )
