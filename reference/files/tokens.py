"""(text, ids) of the model's tokenizer, and tiny tokenizers of every pre-tokenizer."""

import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import AutoTokenizer

PROSE = [
    "", " ", "  ", "a", "Hello, world!", "The quick brown fox jumps over the lazy dog.",
    "It's what we'd call a 'test', isn't it? They'll say I'm wrong; we've seen you're not.",
    "DON'T SHOUT, I'M HERE'S", "  leading and trailing  ", "tabs\tand\nnewlines\r\n\r\n  mixed \t ",
    "\n\n\n", "line one\n\n  line two\n   \n\tline three", "ends with spaces   ", "a  b   c    d",
    "semi-colon; colon: dash - em\u2014dash \u2026 ellipsis", "$1,234.56 (50% off!) #hash @you & me",
    "e-mail: someone@example.org, see https://example.org/a/b?c=d&e=f#g", "CamelCaseWords snake_case_words",
    "antidisestablishmentarianism floccinaucinihilipilification", "x" * 65, "ha" * 40, "=" * 33, "-" * 80,
]
CODE = [
    "fn main() {\n    println!(\"{}\", 1 + 2);\n}\n",
    "def f(x: int) -> str:\n\treturn f\"{x:03d}\"  # comment\n",
    "for (int i = 0; i < 10; ++i) { a[i] += b[i] * 0x1F; }",
    "SELECT COUNT(*) FROM t WHERE name = 'O''Brien' AND n >= 42;",
    "{\"key\": [1, 2.5, -3e-7, true, null], \"nested\": {\"a\": \"\\u00e9\"}}",
    "<div class=\"x\">&nbsp;</div><!-- y -->", "git commit -m 'fix: #123' && git push", "a->b::c<d>(e)[0]{f}",
    "\\begin{align} x^2 + y_1 &= \\frac{1}{2} \\\\ \\end{align}", "0b1010 0o777 0xDEADBEEF 1_000_000",
]
DIGITS = [
    "0", "7", "42", "123", "1234", "2024-11-23T08:54:23Z", "3.14159265358979", "1,000,000", " 1", "  1", "   12",
    "1  2   3", "a1b22c333", "\n1\n 2\n  3", "room 101, floor  7", "\u00bd \u00b2 \u2167 \u0663\u0664 \uff11\uff12 \u4e09",
    "1.\t2.\t\t3.", "v1.2.3-rc4+5", "9" * 30,
]
UNICODE = [
    "na\u00efve caf\u00e9 \u00fcber \u00c5ngstr\u00f6m", "e\u0301 (combining) \u00e9 (composed)",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c",
    "\uc548\ub155\ud558\uc138\uc694", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\U0001f600\U0001f680\U0001f9d1\u200d\U0001f4bb",
    "\U0001f1e9\U0001f1ea\U0001f1ef\U0001f1f5", "\u2764\ufe0f \u270b\U0001f3fd", "\u00a0non-breaking\u2003em\u3000ideographic",
    "\u200bzero\u200dwidth\ufeff", "\u2200x\u2208\u211d: x\u00b2 \u2265 0", "\ufb01ligature \u212b \u00b5", "\U0001d54f\U0001d518",
    "mixed \u4e2d\u6587 and English \u0438 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 123", "\u0000\u0001\u007f", "\ufffd",
]
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b", " <|im_end|> ", "<|im_end|><|im_end|>", "<|im_end", "|im_end|>", "<repo_name>x<file_sep>y",
    "<|unknown|>", "<filename>src/main.rs\n1<jupyter_code>", "<IM_END>", "<empty_output>\n\n<issue_start>",
]
ALL = PROSE + CODE + DIGITS + UNICODE + SPECIAL


def mixed(count: int) -> list[str]:
    """Seeded concatenations of pieces of the texts above."""
    rng = random.Random(7)
    joins = ["", "", " ", "  ", "\n", "\n\n", "\t", " 5", "   "]
    out = []
    for _ in range(count):
        pieces = []
        for _ in range(rng.randint(2, 5)):
            text = rng.choice(ALL)
            start = rng.randrange(len(text) + 1)
            pieces += [text[start : start + rng.randint(1, 14)], rng.choice(joins)]
        out.append("".join(pieces))
    return out


def smollm2(gguf: Path) -> dict:
    """By transformers from the same GGUF, with the pre-tokenizer of the model's own
    tokenizer.json put back: transformers 5.23 does not know the name `smollm` and takes GPT-2's,
    which differs where a digit follows two or more spaces. `unlike_transformers` counts those.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    texts = ALL + mixed(300)
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    tokenizer.backend_tokenizer.pre_tokenizer = smollm_words()
    cases = [[text, tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    decoded = [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
               for _, ids in cases]
    return {
        "unlike_transformers": sum(a != ids for a, (_, ids) in zip(plain, cases)),
        "cases": [[text, ids, None if back == text else back]
                  for (text, ids), back in zip(cases, decoded)],
    }


def smollm_words() -> Sequence:
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def regex_words(regex: str) -> Sequence:
    return Sequence([Split(Regex(regex), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def tiny() -> list[dict]:
    """Tokenizers of a few hundred tokens, trained here, one per pre-tokenizer: they test the
    construction from a GGUF where no model is at hand."""
    families = {
        "gpt-2": (ByteLevel(add_prefix_space=False), False, False),
        "smollm": (smollm_words(), False, False),
        "llama-bpe": (regex_words(LLAMA3), False, True),
        "qwen2": (regex_words(QWEN2), True, False),
    }
    return [tiny_family(name, *family) for name, family in families.items()]


def tiny_family(name: str, words, nfc: bool, whole_words: bool) -> dict:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=ByteLevel.alphabet(), show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE + CODE + DIGITS, trainer)
    # A word that the merges do not reach, for tokenizers that take whole words.
    extra = ["Hello", "<|im_start|>", "<|im_end|>", "<think>"]
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    tokens = sorted(vocab, key=vocab.get) + [t for t in extra if t not in vocab]
    merges = [tuple(merge) for merge in model_merges(tokenizer)]
    tokenizer.model = models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=whole_words,
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in extra[1:3]])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    types = [3 if t in extra[1:3] else 4 if t == "<think>" else 1 for t in tokens]
    texts = ALL[::2] + ["Hello Hello HelloHello", "<think>Hm</think><|im_end|>", "e\u0301\u212b"] + mixed(20)
    return {
        "pre": name,
        "tokens": tokens,
        "types": types,
        "merges": [" ".join(merge) for merge in merges],
        "cases": [[text, tokenizer.encode(text, add_special_tokens=False).ids] for text in texts],
    }


def model_merges(tokenizer: Tokenizer) -> list:
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]
