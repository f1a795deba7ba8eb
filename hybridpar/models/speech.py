"""A speech recogniser: bidirectional LSTMs over spectra, in plain PyTorch: nothing here knows about ranks.

    spectra, lengths -> Front -> Layer x depth -> Head -> logits          Graves, Mohamed and Hinton 2013

Utterances differ in length: they come padded, with their lengths, and are packed for the LSTMs, so padding never enters
a sum. The parts pass (x, lengths) on to one another, so that the pipeline can cut between any two.

`tensor_plan` cuts the LSTMs over the tensor axis by hidden units. It and `chain` are data, read by
`hybridpar.parallelize`.

b batch, t frames, m mel bands, d width, k classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Front(nn.Module):
    """From mel bands to features, frame by frame."""

    def __init__(self, bands: int, width: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(bands, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, spectra: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # [b, t, m], [b] -> [b, t, d], [b]
        return self.dropout(F.relu(self.norm(self.project(spectra)))), lengths


class Layer(nn.Module):
    """One bidirectional LSTM: half of the features read forwards, half backwards."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # [b, t, d], [b] -> the same
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        read, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.dropout(read), lengths


class Head(nn.Module):
    """The mean over the frames of each utterance, and a logit for each word."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, words)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # [b, t, d], [b] -> [b, k]
        return self.project(x.sum(1) / lengths[:, None])  # frames after the end are zeros


class SpeechRecogniser(nn.Module):
    """Which word an utterance is.

    Example:
        >>> import torch
        >>> model = SpeechRecogniser(bands=40, words=10, width=64, depth=2)
        >>> model(torch.zeros(2, 50, 40), torch.tensor([50, 31])).shape
        torch.Size([2, 10])
    """

    tensor_plan = {"layers.*.lstm": "recurrent"}
    chain = ("front", "layers.*", "head")

    def __init__(self, bands: int, words: int, width: int, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width={width} cannot be halved between the two directions: use an even number")
        self.front = Front(bands, width, dropout)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(depth))
        self.head = Head(width, words)

    def forward(self, spectra: Tensor, lengths: Tensor) -> Tensor:  # [b, t, m], [b] -> [b, k]
        x, lengths = self.front(spectra, lengths)
        for layer in self.layers:
            x, lengths = layer(x, lengths)
        return self.head(x, lengths)
