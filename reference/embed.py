"""Tiny random encoders in sentence-transformers' folders, with the vectors that it gives a few texts:
crates/metal-candle/tests/data/embed, for tests/embed.rs.

    pip install sentence-transformers && python reference/embed.py [all-MiniLM-L6-v2]

`bert` is a whole folder as sentence-transformers writes it. `roberta` is one of transformers alone, whose positions
begin after that of its padding. Given the folder of the real model, its vectors are made anew, too.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent.parent / "crates/metal-candle/tests/data/embed"
MAX_TOKENS = 24
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "red", "green", "river", "##s", "##ing", "##ed"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!"
VOCABULARY = SPECIAL + WORDS + list(LETTERS) + [f"##{letter}" for letter in LETTERS[:36]]

SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
}
CONFIGS = {
    "bert": SIZES | {"model_type": "bert", "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0},
    "roberta": SIZES
    | {"model_type": "roberta", "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 0, "hidden_act": "gelu_new"},
}
TEXTS = [
    "the cat sat on the mat.",
    "a",
    "",
    "The RED dog sits on a green mat, walking rivers?",
    "dogs",
    "a very long text that is cut, for it has more tokens than are read of any text by this model: the cat sat on it",
    "cat 7",
]
REAL = [
    "A cat sat on the mat.",
    "Quantum computers factor integers, at least in principle; nobody has built one that is large enough to matter.",
    "Ein Hund bellt.",
]


def tokenizer():
    inner = Tokenizer(models.WordPiece({token: i for i, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As many real ones are saved; neither may be believed.
    inner.enable_truncation(8)
    inner.enable_padding(length=8)
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    special = dict(zip(names, SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=MAX_TOKENS, **special)


def random_weights(model, seed):
    """Large enough that attention is far from uniform and every bias, norm and table is seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "embeddings" in name and p.dim() == 2:
            p.data = noise
        elif p.dim() == 2:
            p.data = noise * (1.6 / p.shape[1] ** 0.5)
        else:
            p.data = 0.3 * noise + (0.0 if name.endswith("bias") else 1.0)


def write(name, seed):
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name], indent=2) + "\n")
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder), add_pooling_layer=False).float().eval()
    random_weights(model, seed)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def vectors(model, texts=TEXTS):
    return [[float(f"{x:.9g}") for x in row] for row in model.encode(texts, batch_size=len(texts)).tolist()]


def main():
    out = {"texts": TEXTS}
    bert = write("bert", 1)
    transformer = Transformer(str(bert), max_seq_length=MAX_TOKENS)
    pool = lambda mode: Pooling(CONFIGS["bert"]["hidden_size"], pooling_mode=mode)
    out["cls"] = vectors(SentenceTransformer(modules=[transformer, pool("cls")], device="cpu"))
    model = SentenceTransformer(modules=[transformer, pool("mean"), Normalize()], device="cpu")
    out["bert"] = vectors(model)
    # Into a folder of its own, or it would read what it writes.
    model.save_pretrained(str(FOLDER / "saved"), create_model_card=False)
    shutil.rmtree(bert)
    (FOLDER / "saved").rename(bert)
    assert vectors(SentenceTransformer(str(bert), device="cpu")) == out["bert"]
    out["roberta"] = vectors(SentenceTransformer(str(write("roberta", 2)), device="cpu"))
    (FOLDER / "vectors.json").write_text(json.dumps(out) + "\n")
    if len(sys.argv) > 1:
        real = {"texts": REAL, "vectors": vectors(SentenceTransformer(sys.argv[1], device="cpu"), REAL)}
        (FOLDER / "minilm.json").write_text(json.dumps(real) + "\n")


main()
