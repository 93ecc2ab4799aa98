"""Character-level language models: the next character is the class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_fl.models.classifier import Classifier


class CharLSTM(Classifier):
    """The character LSTM of the FedAvg paper: an embedding of 8, two LSTM layers of 256 units, and the class scores.

    Reads int64 ``[batch, length]``. With ``every_place`` it predicts the next character at every position, with scores
    ``[batch, vocabulary, length]``; otherwise only after the last one, ``[batch, vocabulary]``, as LEAF does. With the
    90 tokens of Adaptive Federated Optimization it has 2,048 parameters more than that paper's 820,522, because
    PyTorch's LSTM has two bias vectors instead of one.

    Args:
        vocabulary_size: Number of characters; ``ShakespeareDataModule`` has 81.
        every_place: Whether to predict at every position of a sequence.
        embedding: Size of the embedding.
        hidden: Units of a layer.
        num_layers: Number of layers.
        lr: Learning rate.
        momentum: Momentum of SGD.

    References:
        McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, 2017,
        arXiv:1602.05629. Reddi et al., *Adaptive Federated Optimization*, 2021, arXiv:2003.00295.
    """

    def __init__(
        self,
        vocabulary_size: int = 81,
        every_place: bool = True,
        embedding: int = 8,
        hidden: int = 256,
        num_layers: int = 2,
        lr: float = 1.0,
        momentum: float = 0.0,
    ) -> None:
        net = _LSTM(vocabulary_size, every_place, embedding, hidden, num_layers)
        super().__init__(net, vocabulary_size, lr, momentum)


class CharTransformer(Classifier):
    r"""A small causal transformer over characters, with pre-layer normalisation.

    Reads int64 ``[batch, length]`` and predicts the next character as :class:`CharLSTM` does. With :math:`V`
    characters, width :math:`d`, length :math:`T` and :math:`L` blocks it has
    :math:`2 V d + V + T d + L (12 d^2 + 13 d) + 2 d` parameters.

    Args:
        vocabulary_size: Number of characters; ``ShakespeareDataModule`` has 81.
        every_place: Whether to predict at every position of a sequence.
        max_length: Length of the longest sequence.
        width: Width of the model, a multiple of ``num_heads``.
        num_heads: Number of attention heads.
        num_layers: Number of blocks.
        dropout: Dropout in the blocks.
        lr: Learning rate.
        momentum: Momentum of SGD.

    References:
        Vaswani et al., *Attention Is All You Need*, 2017, arXiv:1706.03762.
    """

    def __init__(
        self,
        vocabulary_size: int = 81,
        every_place: bool = True,
        max_length: int = 80,
        width: int = 64,
        num_heads: int = 4,
        num_layers: int = 2,
        dropout: float = 0.0,
        lr: float = 0.1,
        momentum: float = 0.9,
    ) -> None:
        net = _Transformer(vocabulary_size, every_place, max_length, width, num_heads, num_layers, dropout)
        super().__init__(net, vocabulary_size, lr, momentum)


class _LSTM(nn.Module):
    def __init__(self, vocabulary_size: int, every_place: bool, embedding: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.every_place = every_place
        self.embed = nn.Embedding(vocabulary_size, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary_size)

    def forward(self, x: Tensor) -> Tensor:
        states = self.lstm(self.embed(x))[0]
        return self.head(states).transpose(1, 2) if self.every_place else self.head(states[:, -1])


class _Transformer(nn.Module):
    def __init__(
        self,
        vocabulary_size: int,
        every_place: bool,
        max_length: int,
        width: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.every_place, self.max_length = every_place, max_length
        self.embed = nn.Embedding(vocabulary_size, width)
        self.place = nn.Parameter(0.02 * torch.randn(max_length, width))  # learned positions, scaled as in GPT-2
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, num_heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"The sequences have {length} characters, more than max_length={self.max_length}. "
                "Shorten them, or increase max_length."
            )
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        states = self.embed(x) + self.place[:length]
        for block in self.blocks:
            states = block(states, src_mask=mask)
        states = self.norm(states)
        return self.head(states).transpose(1, 2) if self.every_place else self.head(states[:, -1])
