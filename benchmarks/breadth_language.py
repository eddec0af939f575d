"""Networks on words, sounds, graphs and tables for `breadth`: published architectures with one layer, narrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import own_networks
import torch
from architectures import BATCH, TOKENS, Architecture, Outputs
from breadth_vision import vision_library
from torch import Tensor, nn

WORDS = 100
_SEQUENCE = {0: BATCH, 1: TOKENS}
_BATCH = {0: BATCH}
_FIXED: Mapping[str, Mapping[int, str]] = {}
_HEADS = {"num_hidden_layers": 1, "num_attention_heads": 4}
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.08, **_HEADS}
_TEXT = {"vocab_size": WORDS, **_SMALL}
_MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Named(nn.Module):
    """A transformers model that takes its inputs by name, and gives some tensors of its outputs."""

    def __init__(self, model: nn.Module, names: Sequence[str], *keys: str, **options: Any) -> None:
        super().__init__()
        self.model, self.names, self.keys, self.options = model, tuple(names), keys, options

    def forward(self, first: Tensor, second: Tensor | None = None) -> tuple[Tensor, ...]:
        values = (first,) if second is None else (first, second)
        found = self.model(**dict(zip(self.names, values, strict=True)), **self.options)
        return tuple(found[key] for key in self.keys)


class WithCache(nn.Module):
    """A decoder of one layer's keys and values: logits and the grown cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.update(keys, values, 0)
        found = self.model(ids, past_key_values=cache, use_cache=True)
        return found.logits, cache.layers[0].keys, cache.layers[0].values


class GraphNetwork(nn.Module):
    """Two rounds of messages along edges [2, E] between nodes [N, F]: gather, sum by scattering, product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 7)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            sent = layer(nodes)
            target = edges[1][:, None].expand(-1, sent.shape[1])
            nodes = torch.relu(sent + torch.zeros_like(sent).scatter_add(0, target, sent[edges[0]]))
        found: Tensor = self.head(nodes)
        return found


class Recommender(nn.Module):
    """DLRM in small: tables of embeddings, a bottom net, dot products of all pairs, a top net."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(100, 16) for _ in range(4))
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 25, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        low = self.bottom(dense)
        looked_up = [table(ids[:, index]) for index, table in enumerate(self.tables)]
        vectors = torch.stack([low, *looked_up], 1)
        pairs = vectors @ vectors.transpose(1, 2)
        found: Tensor = self.top(torch.cat([low, pairs.flatten(1)], 1))
        return found


class Encoder(nn.Module):
    """torch's own encoder behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 64)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 1)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.layers(self.embedding(ids))
        return found


def _whisper() -> nn.Module:
    import transformers as t

    config = t.WhisperConfig(
        vocab_size=WORDS, num_mel_bins=20, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50,
        max_target_positions=32, decoder_start_token_id=1, **_MARKS,
    )  # fmt: skip
    model = t.WhisperForConditionalGeneration(config)
    return Named(model, ("input_features", "decoder_input_ids"), "logits", use_cache=False)


def _t5() -> nn.Module:
    import transformers as t

    config = t.T5Config(
        vocab_size=WORDS, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return Named(t.T5ForConditionalGeneration(config), ("input_ids", "decoder_input_ids"), "logits", use_cache=False)


def _bart() -> nn.Module:
    import transformers as t

    config = t.BartConfig(
        vocab_size=WORDS, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=32, **_MARKS,
        decoder_start_token_id=1,
    )  # fmt: skip
    return Named(t.BartForConditionalGeneration(config), ("input_ids", "decoder_input_ids"), "logits", use_cache=False)


def _clip() -> nn.Module:
    import transformers as t

    config = t.CLIPConfig(
        text_config={"vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": 2, **_SMALL},
        vision_config={"image_size": 32, "patch_size": 8, **_SMALL},
        projection_dim=32,
    )
    return Named(t.CLIPModel(config), ("input_ids", "pixel_values"), "logits_per_image")


def _sam() -> nn.Module:
    import transformers as t

    config = t.SamConfig(
        vision_config={
            "hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 8, "mlp_dim": 64, "window_size": 4, "global_attn_indexes": [1],
            "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
        },
    )  # fmt: skip
    names = ("pixel_values", "input_points")
    return Named(t.SamModel(config), names, "iou_scores", "pred_masks", multimask_output=True)


def _vits() -> nn.Module:
    import transformers as t

    config = t.VitsConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64, flow_size=32,
        spectrogram_bins=33, use_stochastic_duration_prediction=False, upsample_initial_channel=32,
        upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]], prior_encoder_num_flows=1, prior_encoder_num_wavenet_layers=1,
        duration_predictor_filter_channels=32, noise_scale=0.0, noise_scale_duration=0.0,
    )  # fmt: skip
    return Named(t.VitsModel(config), ("input_ids",), "waveform")


def _mamba() -> nn.Module:
    import transformers as t

    config = t.MambaConfig(vocab_size=WORDS, hidden_size=32, state_size=8, num_hidden_layers=1)
    return Outputs(t.MambaForCausalLM(config), "logits", use_cache=False)


def _llama_cache() -> nn.Module:
    import transformers as t

    return WithCache(t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=2, **_TEXT)))


def _wav2vec2() -> nn.Module:
    import transformers as t

    config = t.Wav2Vec2Config(
        conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, **_TEXT | {"vocab_size": 32},
    )  # fmt: skip
    return Named(t.Wav2Vec2ForCTC(config), ("input_values",), "logits")


def _segformer() -> nn.Module:
    import transformers as t

    config = t.SegformerConfig(
        hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2, sr_ratios=[4, 2], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=32,
    )  # fmt: skip
    return Named(t.SegformerForSemanticSegmentation(config), ("pixel_values",), "logits")


def _yolos() -> nn.Module:
    import transformers as t

    config = t.YolosConfig(image_size=[32, 32], patch_size=8, num_detection_tokens=5, **_SMALL)
    return Named(t.YolosForObjectDetection(config), ("pixel_values",), "logits", "pred_boxes")


def _dinov2() -> nn.Module:
    import transformers as t

    config = t.Dinov2Config(image_size=32, patch_size=8, mlp_ratio=2, hidden_size=64, **_HEADS)
    return Named(t.Dinov2Model(config), ("pixel_values",), "last_hidden_state")


def _text(kind: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers as t

        config = getattr(t, f"{kind}Config")(**{**_TEXT, **options})
        cached = {"use_cache": False} if "Causal" in head or "LMHead" in head else {}
        return Outputs(getattr(t, kind + head)(config), "logits", **cached)

    return build


def _with_transformers(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def first_declared() -> nn.Module:
        vision_library()  # transformers imports torchvision where it is installed
        return build()

    return first_declared


def _ids(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(3, WORDS, shape)


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def _mask() -> Tensor:
    return (torch.arange(16)[None] < torch.tensor([[16], [11]])).long()


def _edges() -> Tensor:
    return torch.randint(0, 20, (2, 60))


def _transformer(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Mapping[str, Callable[[], Tensor]],
    dynamic: Mapping[str, Mapping[int, str]],
) -> Architecture:
    return Architecture(name, "transformers", _with_transformers(build), inputs, dynamic)


def _masked(name: str, build: Callable[[], nn.Module]) -> Architecture:
    return _transformer(name, build, {"ids": _ids(2, 16), "mask": _mask}, {"ids": _SEQUENCE, "mask": _SEQUENCE})


_GPT = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32, **_MARKS}
_DISTIL = {"dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 128}
_OPT = {"ffn_dim": 128, "max_position_embeddings": 32, "word_embed_proj_dim": 64, **_MARKS}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16, **_MARKS}
_IMAGE = {"image": _numbers(2, 3, 32, 32)}
NETWORKS = (
    _masked("bert", _text("Bert", "ForMaskedLM")),
    _masked("roberta", _text("Roberta", "ForSequenceClassification", **_MARKS)),
    _masked("albert", _text("Albert", "ForMaskedLM", embedding_size=32)),
    _masked("deberta", _text("DebertaV2", "ForSequenceClassification", relative_attention=True, pos_att_type=["p2c"])),
    _masked("distilbert", _text("DistilBert", "ForSequenceClassification", **_DISTIL)),
    _masked("gpt2", _text("GPT2", "LMHeadModel", **_GPT)),
    _masked("opt", _text("OPT", "ForCausalLM", **_OPT)),
    _masked("llama", _text("Llama", "ForCausalLM", **_GROUPED)),
    _masked("mistral", _text("Mistral", "ForCausalLM", sliding_window=8, **_GROUPED)),
    _masked("qwen2", _text("Qwen2", "ForCausalLM", **_GROUPED)),
    _masked("gemma", _text("Gemma", "ForCausalLM", **_GROUPED)),
    _masked("mixtral", _text("Mixtral", "ForCausalLM", num_local_experts=4, num_experts_per_tok=2, **_GROUPED)),
    _transformer(
        "llama_cache",
        _llama_cache,
        {"ids": _ids(1, 1), "keys": _numbers(1, 2, 16, 16), "values": _numbers(1, 2, 16, 16)},
        {"keys": {2: TOKENS}, "values": {2: TOKENS}},
    ),
    _transformer("mamba", _mamba, {"ids": _ids(2, 8)}, {"ids": _BATCH}),
    _transformer(
        "t5", _t5, {"ids": _ids(2, 16), "decoder_ids": _ids(2, 8)}, {"ids": _SEQUENCE, "decoder_ids": _BATCH}
    ),
    _transformer(
        "bart", _bart, {"ids": _ids(2, 16), "decoder_ids": _ids(2, 8)}, {"ids": _SEQUENCE, "decoder_ids": _BATCH}
    ),
    _transformer(
        "whisper",
        _whisper,
        {"features": _numbers(2, 20, 100), "ids": _ids(2, 16)},
        {"features": _BATCH, "ids": _SEQUENCE},
    ),
    _transformer("wav2vec2", _wav2vec2, {"signal": _numbers(2, 1000)}, {"signal": _BATCH}),
    _transformer("vits", _vits, {"ids": _ids(1, 12)}, _FIXED),
    _transformer("clip", _clip, {"ids": _ids(2, 16), "pixels": _numbers(2, 3, 32, 32)}, _FIXED),
    _transformer(
        "sam", _sam, {"image": _numbers(1, 3, 64, 64), "points": lambda: torch.rand(1, 1, 2, 2) * 60}, _FIXED
    ),
    _transformer("segformer", _segformer, _IMAGE, {"image": _BATCH}),
    _transformer("yolos", _yolos, _IMAGE, {"image": _BATCH}),
    _transformer("dinov2", _dinov2, _IMAGE, {"image": _BATCH}),
    Architecture("encoder", "own", Encoder, {"ids": _ids(2, 16)}, {"ids": _SEQUENCE}),
    Architecture("lstm_tagger", "own", lambda: own_networks.LstmTagger(WORDS, 16, 24), {"ids": _ids(2, 16)},
                 {"ids": _SEQUENCE}),
    Architecture("gru_tagger", "own", lambda: own_networks.GruTagger(20, 24), {"frames": _numbers(2, 16, 20)},
                 {"frames": _SEQUENCE}),
    Architecture("gqa_decoder", "own", lambda: own_networks.GqaDecoder(64, layers=1, vocabulary=WORDS),
                 {"ids": _ids(2, 16)}, {"ids": _SEQUENCE}),
    Architecture("mamba_any_length", "own", lambda: own_networks.SelectiveStateDecoder(32, WORDS), {"ids": _ids(2, 16)},
                 {"ids": _SEQUENCE}),
    Architecture("group_norm_1d", "own", own_networks.GroupNormAutoencoder, {"signal": _numbers(2, 2, 128)},
                 {"signal": _BATCH}),
    Architecture("graph", "own", GraphNetwork, {"nodes": _numbers(20, 16), "edges": _edges}, _FIXED),
    Architecture("dlrm", "own", Recommender, {"dense": _numbers(2, 13), "sparse": _ids(2, 4)},
                 {"dense": _BATCH, "sparse": _BATCH}),
)  # fmt: skip
