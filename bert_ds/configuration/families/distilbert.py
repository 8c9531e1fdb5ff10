"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108): BERT's layers, half as many, without segments and pooler."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_ds.configuration.families.bert_layers import Activation, BertLayersConfig
from bert_ds.configuration.reading.config_section import DropoutProbability, PositiveFloat, Size


class DistilBertConfig(BertLayersConfig):
    """The DistilBERT encoder; the defaults are DistilBERT-base uncased.

    Sizes are called as in the other families, and as transformers calls them too; its config.json has the names of
    HF_NAMES.
    """

    TITLE = "DistilBERT"
    HF_TYPES = {"distilbert": {}}
    HF_NAMES = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
    }
    SIZES = (*BertLayersConfig.SIZES, "max_position_embeddings")
    CLASSIFIER_DROPOUTS = ("qa_dropout", "seq_classif_dropout")
    DROPOUTS = (*BertLayersConfig.DROPOUTS, "dropout", "attention_dropout", *CLASSIFIER_DROPOUTS)

    type: Literal["distilbert"] = "distilbert"
    """Family of the encoder."""
    vocab_size: Annotated[int, Field(ge=8, le=2**24)] = 30522
    """Number of word pieces of the tokenizer, without padding rows."""
    hidden_size: Size = 768
    """Width of the residual stream; `dim` in config.json."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 6
    """Number of transformer layers; `n_layers` in config.json."""
    num_attention_heads: Size = 12
    """Number of attention heads, `n_heads` in config.json; divides hidden_size."""
    intermediate_size: Size = 3072
    """Width of the feed-forward layer; `hidden_dim` in config.json."""
    activation: Activation = "gelu"
    """"gelu" is the published erf form, "gelu_new" the tanh approximation; or "relu" or "silu"."""
    dropout: DropoutProbability = 0.1
    """Dropout after the embeddings and after both dense blocks of a layer."""
    attention_dropout: DropoutProbability = 0.1
    """Dropout of the attention probabilities."""
    qa_dropout: DropoutProbability = 0.1
    """Dropout in front of the scores of an answer's begin and end."""
    seq_classif_dropout: DropoutProbability = 0.2
    """Dropout in front of the classifier of whole sequences."""
    max_position_embeddings: Size = 512
    """Longest sequence in tokens."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the normal initialisation of every weight matrix."""

    @property
    def hidden_act(self) -> str:
        """BERT's name for the activation."""
        return self.activation

    @property
    def hidden_dropout_prob(self) -> float:
        """BERT's name for the dropout of hidden states."""
        return self.dropout

    @property
    def attention_probs_dropout_prob(self) -> float:
        """BERT's name for the dropout of attention probabilities."""
        return self.attention_dropout

    @property
    def layer_norm_eps(self) -> float:
        """1e-12: config.json has no word for it."""
        return 1e-12

    @property
    def norm_position(self) -> str:
        """ "post": LayerNorm behind each block."""
        return "post"

    @property
    def classifier_dropout_prob(self) -> float:
        """That of whole sequences; a task sets all of them alike."""
        return self.seq_classif_dropout
