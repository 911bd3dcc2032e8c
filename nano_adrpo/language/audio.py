"""Questions about sounds on their way into Qwen2.5-Omni (models/omni.py): a mark for each token of the sound in front of the
question, and the sound's embeddings, which are computed once."""

import hashlib
import warnings
from pathlib import Path

import torch

from nano_adrpo.errors import InputError, about
from nano_adrpo.files import safetensors, wav
from nano_adrpo.language.chat import TextCodec, encode_prompts
from nano_adrpo.models.omni import Omni, tokens_of

BEGIN, AUDIO, END = "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"  # AUDIO is the placeholder of one token
# What the release's template writes of messages whose contents are texts.
TEMPLATE = """\
{% for message in messages %}
{% if loop.first and message.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class AudioCodec(TextCodec):
    """TextCodec's calls for a model that hears. A prompt is a pair: a question, and the path of a WAV file or None. In the text
    the sound stands before the question; a folder without a chat template has the release's.

    embeddings   a folder that keeps the embeddings of sounds for later runs; None keeps them in memory, all of them

    Raises InputError naming the file or option that does not fit.
    """

    published = TEMPLATE

    def __init__(self, model, *options, embeddings=None, **more):
        if not isinstance(model, Omni):
            raise InputError(f"a {model.config.model_type} reads text only; expected Qwen2.5-Omni's folder, for sounds")
        super().__init__(model, *options, **more)
        self.model, self.folder = model, embeddings and Path(embeddings)
        self.tokens, self.keys, self.memory, self.tower = {}, {}, {}, None
        wanted, found = model.config.audio_token_index, self.tokenizer.token_to_id(AUDIO)
        if found != wanted:
            raise InputError(f"tokenizer.json: token {AUDIO!r} has id {found}; expected {wanted}, config.json's placeholder")

    def encode(self, prompts, longest, device=None):
        """N prompts -> ids and mask [N, T], padded on the left; the placeholder stands once for each token of a sound, 25 a
        second. Only the headers of the WAV files are read. Raises InputError naming the first prompt of more than `longest`
        tokens."""
        texts = self.write([f"{BEGIN}{AUDIO}{END}{question}" if path else question for question, path in prompts])
        for index, (question, path) in enumerate(prompts):
            if texts[index].count(AUDIO) != bool(path):
                count = f"{texts[index].count(AUDIO)} times {AUDIO}; expected {int(bool(path))}, by the chat template"
                raise InputError(f"the prompt of the question {question[:60]!r} has {count}")
            texts[index] = texts[index].replace(AUDIO, AUDIO * self.length(path) if path else "")
        return encode_prompts(self.tokenizer, texts, longest, self.size, special=not self.template, device=device)

    def length(self, path):
        """The number of tokens of a sound."""
        if path not in self.tokens:
            samples = wav.samples(path)
            with about(path):
                self.tokens[path] = tokens_of(samples)
        return self.tokens[path]

    def clips(self, prompts):
        """The embeddings of the prompts' sounds, N lists of one tensor [n_i, D] or none. They are bfloat16, so that a run which
        computes them and one which reads them have the same digits. Equal sounds are one tensor."""
        found = {path: self.embedding(path) for path in dict.fromkeys(path for _, path in prompts if path)}
        return [[found[path]] if path else [] for _, path in prompts]

    def embedding(self, path):
        if self.folder is None:
            if path not in self.memory:
                self.memory[path] = self.embed(path)
            return self.memory[path]
        key = self.key(path)
        file = self.folder / f"{key}.safetensors"
        stored = read_hashed(file, key) if file.exists() else None
        if stored is None:
            stored = self.embed(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            safetensors.save(file, {"embedding": stored, "sha256": sha256(stored, key)})
        return stored.to(self.model.model.embed_tokens.weight.device)

    def embed(self, path):
        sound, device = wav.read_wav(path), self.model.model.embed_tokens.weight.device
        with torch.autocast(device.type, enabled=False):  # in the tower's own dtype, wherever this is called
            (embedding,) = self.model.embed_clips([sound.to(device)])
        return embedding.bfloat16()

    def key(self, path):
        """What an embedding is kept under: the SHA-256 of the file's bytes and of all that computes with them."""
        if self.tower is None:
            tower, self.tower = self.model.audio_tower, hashlib.sha256()
            for name, tensor in tower.state_dict().items():
                self.tower.update(bytes(sha256(tensor, f"{tower.config} {name} {tensor.device.type}").tolist()))
        if path not in self.keys:
            digest = self.tower.copy()
            digest.update(Path(path).read_bytes())
            self.keys[path] = digest.hexdigest()
        return self.keys[path]


def sha256(tensor, name):
    """The SHA-256 of a tensor's name, shape, dtype and bytes, uint8 [32]."""
    digest = hashlib.sha256(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def read_hashed(file, key):
    """The embedding in the file of that key; None, with a warning, where the file is damaged: it is computed again and written
    over."""
    try:
        stored = safetensors.Checkpoint(file)
        if stored.home.keys() == {"embedding", "sha256"}:
            embedding = stored.read("embedding")
            if torch.equal(stored.read("sha256"), sha256(embedding, key)):
                return embedding
    except InputError:
        pass
    warnings.warn(f"{file}: the embedding of a sound is damaged; it is computed again", stacklevel=4)
    return None
