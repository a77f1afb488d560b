"""Models as users have them, small: each with an example of its inputs, labels and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to cut.

    Attributes:
        make: Makes it; the same weights each time.
        inputs: Argument of forward -> tensor (samples, ...).
        labels: Tensor (samples, ...).
        loss: Called with (prediction, label).
        release: Inputs that pieces at the server need.
    """

    make: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    labels: Tensor
    loss: Loss = nn.functional.cross_entropy
    release: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Tensor]]:
        count = len(self.labels)
        return [{"label": self.labels[i], **{k: v[i] for k, v in self.inputs.items()}} for i in range(count)]


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes(count: int, *shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return made


# --- ResNet-18, as He et al. 2015 and torchvision have it, of another width -----------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for place, times in enumerate((1, 2, 4, 8)):
            outputs, stride = width * times, 1 if place == 0 else 2
            blocks = nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1))
            setattr(self, f"layer{place + 1}", blocks)
            inputs = outputs
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class UNet(nn.Module):
    """Two levels down, two up, with the long skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self.block(1, 4), self.block(4, 8), self.block(8, 8)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.join2, self.join1, self.last = self.block(16, 8), self.block(8, 4), nn.Conv2d(4, 2, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(self.pool(one))
        low = self.bottom(self.pool(two))
        two = self.join2(torch.cat([self.up2(low), two], 1))
        return self.last(self.join1(torch.cat([self.up1(two), one], 1)))


class Tagger(nn.Module):
    """An LSTM over words."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.drop, self.out = nn.Dropout(0.1), nn.Linear(10, 4)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.lstm(self.table(words))
        return self.out(self.drop(states[:, -1]))


class Translator(nn.Module):
    """`nn.Transformer`, encoder and decoder, whose decoder looks at its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.target = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.both, self.out = nn.Transformer(8, 2, 2, 2, 16, 0.0, batch_first=True), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        """Map (batch, length) to (batch, 3)."""
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        return self.out(self.both(self.table(words), self.target(words), tgt_mask=mask).mean(1))


class Pooled(nn.Module):
    """Means over time of an LSTM, whose output is a transposed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        """Map (batch, length) to (batch, 4)."""
        states, _ = self.lstm(self.table(words))
        return self.out(torch.tanh(self.inner((states * states).sum(1) + states.mean(1))))


class Last(nn.Module):
    """Last states of a GRU and of LSTMs of three layers, one in two directions: of shape (layers, batch, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.gru = nn.Embedding(20, 8), nn.GRU(8, 8, batch_first=True)
        self.lstm, self.out = nn.LSTM(8, 4, 3, batch_first=True, bidirectional=True), nn.Linear(28, 4)
        self.deep = nn.LSTM(8, 4, 3, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        """Map (batch, length) to (batch, 4)."""
        states, last = self.gru(self.table(words))
        _, (three, _) = self.deep(states)
        _, (hidden, _) = self.lstm(states)
        both = hidden.permute(1, 0, 2)[:, -2:].flatten(1)
        both = both + torch.cat((hidden[-2], hidden[-1]), dim=1)
        return self.out(torch.cat((last.squeeze(0), both, three.transpose(0, 1).flatten(1)), dim=1))


class Filters(nn.Module):
    """Two convolutions, a skip and the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.norm, self.after = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 3, height, width) to (batch, 3)."""
        hidden = torch.relu(self.norm(self.one(x)))
        return self.out(torch.relu(self.after(self.two(hidden)) + hidden).mean((2, 3)))


class Writer(nn.Module):
    """A forward that takes `input`, makes a module without weights, and writes into slices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, 6) to (batch, 3)."""
        hidden = nn.Tanh()(self.first(input))
        held = torch.zeros(input.size(0), 8)
        held[:, :4] = hidden[:, 4:]
        inner = self.second(held)
        inner[:, 0] = 0
        return self.third(nn.functional.relu(inner)) + hidden[:, :3]


class Tied(nn.Module):
    """A small language model with one table for words in and words out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.middle, self.norm = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 6)), nn.LayerNorm(6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        return self.out(self.norm(x + self.middle(x)))


class TwoNames(nn.Module):
    """Layers with names of their own, which forward calls through a Sequential, where they have others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.body = nn.Sequential(self.first, nn.ReLU(), self.second)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 6) to (batch, 3)."""
        return self.last(self.body(x))


class Encoder(nn.Module):
    """PyTorch's own transformer, without a last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.encoder(self.table(words)).mean(1))


def of_words(prediction: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of the next word; shapes (batch, time, words) and (batch, time)."""
    return nn.functional.cross_entropy(prediction.flatten(0, 1), label.flatten())


def densenet() -> nn.Module:
    from monai.networks.nets import DenseNet121

    return DenseNet121(spatial_dims=2, in_channels=1, out_channels=3, init_features=8, growth_rate=4, bn_size=2)


def dynunet() -> nn.Module:
    """A U-Net whose levels hold each other, and all of whose blocks are in lists too."""
    from monai.networks.nets import DynUNet

    return DynUNet(2, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(2, 4, 4), norm_name="batch")


def basicunet() -> nn.Module:
    """A U-Net that asks whether a value is a tensor."""
    from monai.networks.nets import BasicUNet

    return BasicUNet(2, 1, 2, (2, 2, 4, 4, 4, 2), norm="batch", dropout=0.0)


def transformer(kind: str) -> Callable[[], nn.Module]:
    """A tiny model of Hugging Face with random weights."""

    def make() -> nn.Module:
        import transformers as hf

        small: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 8}
        if kind == "gpt2":
            sizes = {"n_layer": 3, "n_head": 2, "n_embd": 8, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
            return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=13, **sizes))
        if kind == "llama":
            return hf.LlamaForCausalLM(
                hf.LlamaConfig(vocab_size=13, intermediate_size=16, num_key_value_heads=1, **small)
            )
        if kind == "granite":
            sizes = {"intermediate_size": 16, "num_key_value_heads": 1, "embedding_multiplier": 3.0}
            return hf.GraniteForCausalLM(hf.GraniteConfig(vocab_size=13, tie_word_embeddings=False, **sizes, **small))
        if kind == "bert":
            config = hf.BertConfig(
                vocab_size=13, intermediate_size=16, max_position_embeddings=16, num_labels=3, **small
            )
            return hf.BertForSequenceClassification(config)
        if kind == "phi":
            return hf.PhiForCausalLM(hf.PhiConfig(vocab_size=13, intermediate_size=16, embd_pdrop=0.1, **small))
        if kind == "bloom":
            sizes = {"n_layer": 3, "n_head": 2, "hidden_size": 8}
            return hf.BloomForTokenClassification(hf.BloomConfig(vocab_size=13, num_labels=13, **sizes))
        if kind == "modernbert":
            ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
            kinds = {"global_attn_every_n_layers": 2, "local_attention": 4}
            config = hf.ModernBertConfig(
                vocab_size=13, intermediate_size=16, max_position_embeddings=16, num_labels=3, **ids, **kinds, **small
            )
            return hf.ModernBertForSequenceClassification(config)
        if kind.startswith("deberta"):
            relative = {"relative_attention": kind == "deberta-relative", "position_buckets": 4}
            config = hf.DebertaV2Config(
                vocab_size=13,
                intermediate_size=16,
                max_position_embeddings=16,
                num_labels=3,
                pos_att_type=["p2c", "c2p"],
                **relative,
                **small,
            )
            return hf.DebertaV2ForSequenceClassification(config)
        config = hf.ViTConfig(image_size=8, patch_size=4, num_channels=1, intermediate_size=16, num_labels=3, **small)
        return hf.ViTForImageClassification(config)

    return make


class OfText(nn.Module):
    """CLIP's text encoder with a classifier on what it gives for the text."""

    def __init__(self) -> None:
        super().__init__()
        import transformers as hf

        sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}
        config = hf.CLIPTextConfig(vocab_size=13, max_position_embeddings=16, bos_token_id=0, eos_token_id=2, **sizes)
        self.text, self.out = hf.CLIPTextModel(config), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map (batch, length) to (batch, 3)."""
        return self.out(self.text(input_ids=input_ids).pooler_output)


class OfStates(nn.Module):
    """BERT with a classifier on the hidden states of several blocks."""

    def __init__(self) -> None:
        super().__init__()
        import transformers as hf

        sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}
        config = hf.BertConfig(vocab_size=13, max_position_embeddings=16, **sizes)
        self.bert, self.out = hf.BertModel(config, add_pooling_layer=False), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map (batch, length) to (batch, 3)."""
        states = self.bert(input_ids=input_ids, output_hidden_states=True).hidden_states
        return self.out((states[-1] + states[-2] + states[1]).mean(1))


def untie(*modules: nn.Module) -> None:
    """Give each its own weight, as E332 advises where two parties would share one."""
    for module in modules:
        module.weight = nn.Parameter(module.weight.detach().clone())


def bart() -> nn.Module:
    """An encoder and a decoder, each with a table of words, whose forward checks that all texts have as many ends."""
    import transformers as hf

    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 8, "max_position_embeddings": 16}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = hf.BartForSequenceClassification(hf.BartConfig(vocab_size=13, num_labels=3, **sizes, **ids))
    untie(model.model.decoder.embed_tokens)
    return model


def t5() -> nn.Module:
    """An encoder and a decoder, each with a table, whose blocks hand on a bias by positions that has no batch."""
    import transformers as hf

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    model = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=13, **sizes))
    untie(model.decoder.embed_tokens, model.lm_head)
    return model


def swin() -> nn.Module:
    """A transformer for images in two stages, whose embeddings give numbers beside the hidden state."""
    import transformers as hf

    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 4, "window_size": 2, "num_channels": 1, "num_labels": 3}
    return hf.SwinForImageClassification(hf.SwinConfig(depths=[2, 2], num_heads=[1, 2], drop_path_rate=0.0, **sizes))


WORDS = classes(9, 6, 5)
TEXT = {"input_ids": classes(13, 6, 7)}
PADDED = TEXT | {"attention_mask": (torch.arange(7) < torch.tensor([7, 5, 6, 7, 3, 7])[:, None]).long()}
ENDED = {"input_ids": torch.cat([classes(10, 6, 6) + 3, torch.full((6, 1), 2)], 1)}  # each text ends with the token 2
SUBJECTS: dict[str, Subject] = {
    "resnet18": Subject(make=seeded(ResNet18), inputs={"x": drawn(6, 1, 32, 32)}, labels=classes(3, 6)),
    "densenet121": Subject(make=seeded(densenet), inputs={"x": drawn(6, 1, 32, 32)}, labels=classes(3, 6)),
    "unet": Subject(make=seeded(UNet), inputs={"x": drawn(6, 1, 8, 8)}, labels=classes(2, 6, 8, 8)),
    "lstm": Subject(make=seeded(Tagger), inputs={"words": WORDS}, labels=classes(4, 6)),
    "writer": Subject(make=seeded(Writer), inputs={"input": drawn(6, 6)}, labels=classes(3, 6)),
    "aliases": Subject(make=seeded(TwoNames), inputs={"x": drawn(6, 6)}, labels=classes(3, 6)),
    "dynunet": Subject(make=seeded(dynunet), inputs={"x": drawn(6, 1, 16, 16)}, labels=classes(2, 6, 16, 16)),
    "basicunet": Subject(make=seeded(basicunet), inputs={"x": drawn(6, 1, 32, 32)}, labels=classes(2, 6, 32, 32)),
    "tied": Subject(make=seeded(Tied), inputs={"words": WORDS}, labels=WORDS, loss=of_words),
    "transformer": Subject(make=seeded(Translator), inputs={"words": WORDS}, labels=classes(3, 6)),
    "encoder": Subject(make=seeded(Encoder), inputs={"words": WORDS}, labels=classes(3, 6)),
    "gpt2": Subject(make=seeded(transformer("gpt2")), inputs=TEXT, labels=TEXT["input_ids"], loss=of_words),
    "llama": Subject(make=seeded(transformer("llama")), inputs=TEXT, labels=TEXT["input_ids"], loss=of_words),
    "bert": Subject(make=seeded(transformer("bert")), inputs=TEXT, labels=classes(3, 6)),
    "phi": Subject(make=seeded(transformer("phi")), inputs=TEXT, labels=TEXT["input_ids"], loss=of_words),
    "granite": Subject(make=seeded(transformer("granite")), inputs=TEXT, labels=TEXT["input_ids"], loss=of_words),
    "bloom": Subject(
        make=seeded(transformer("bloom")),
        inputs=PADDED,
        labels=TEXT["input_ids"],
        loss=of_words,
        release=("attention_mask",),
    ),
    "modernbert": Subject(
        make=seeded(transformer("modernbert")), inputs=PADDED, labels=classes(3, 6), release=("attention_mask",)
    ),
    "deberta": Subject(make=seeded(transformer("deberta")), inputs=TEXT, labels=classes(3, 6)),
    "deberta-relative": Subject(make=seeded(transformer("deberta-relative")), inputs=TEXT, labels=classes(3, 6)),
    "vit": Subject(make=seeded(transformer("vit")), inputs={"pixel_values": drawn(6, 1, 8, 8)}, labels=classes(3, 6)),
    "swin": Subject(make=seeded(swin), inputs={"pixel_values": drawn(6, 1, 16, 16)}, labels=classes(3, 6)),
    "clip": Subject(make=seeded(OfText), inputs=ENDED, labels=classes(3, 6)),
    "states": Subject(make=seeded(OfStates), inputs=TEXT, labels=classes(3, 6)),
    "bart": Subject(make=seeded(bart), inputs=ENDED, labels=classes(3, 6), release=("input_ids",)),
    "t5": Subject(
        make=seeded(t5),
        inputs=TEXT | {"decoder_input_ids": classes(13, 6, 5)},
        labels=classes(13, 6, 5),
        loss=of_words,
        release=("input_ids", "decoder_input_ids"),
    ),
}

# Models whose values at a cut are transposed tensors, or begin with another dimension than the batch.
TRANSPOSED: dict[str, Subject] = {
    "last": Subject(
        make=seeded(Last),
        inputs={"words": torch.randint(0, 20, (6, 9), generator=torch.Generator().manual_seed(3))},
        labels=classes(4, 6),
    ),
    "pooled": Subject(
        make=seeded(Pooled),
        inputs={"words": torch.randint(0, 20, (6, 37), generator=torch.Generator().manual_seed(3))},
        labels=classes(4, 6),
    ),
    "channels-last": Subject(
        make=seeded(lambda: Filters().to(memory_format=torch.channels_last)),
        inputs={"x": drawn(6, 3, 16, 16)},
        labels=classes(3, 6),
    ),
}
