"""Gander written as plainly as in docs/method.md, in float64: each row alone, without padding, cache or routers."""

from __future__ import annotations

import torch

from phatgoose.models.attach.reference_text import _pieces, plain_pieces
from phatgoose.models.moe.names import modules_by_path

VALUES = ("v_proj", "v", "c_attn", "value")


def delta(expert, path):
    """ΔW, float64 [d_out, d_in]."""
    update = expert.updates[path]
    return update.scale * update.B.double() @ update.A.double()


def block_of(path):
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def inputs_of(base, paths, run):
    """What modules see in a call of the bare model, float64 [rows, tokens, d]."""
    modules, seen = modules_by_path(base.model, paths), {}
    hooks = [
        modules[p].register_forward_hook(lambda m, a, o, p=p: seen.__setitem__(p, a[0].detach().double()))
        for p in paths
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def standardised(u):
    u = u - u.mean(-1, keepdim=True)
    return u / u.std(-1, keepdim=True, correction=0)


class Oracle:
    least = None
    """Whether each token is in doubt, of a sequence: ids → bool [T], or [1] of an encoder's text."""

    def __init__(self, base, pool, layers=1, half_life=64, skipped=0, directions=None, means=False):
        """skipped: how many of a text's first tokens are no evidence. directions: how many are compared, None: all."""
        self.directions, self.means = directions, means
        self.skipped = skipped
        self.base, self.pool, self.decay = base, pool, 2 ** (-1 / half_life)
        self.stack = "encoder." if base.is_encoder_decoder else ""
        blocks = sorted({block_of(p) for p in pool.modules if self.stack in p} - {None})[:layers]
        self.early = [p for p in pool.modules if self.stack in p and block_of(p) in blocks]
        self.read = {}  # expert → its modules
        for expert in pool.experts:
            for block in blocks:
                own = [p for p in expert.sizes if self.stack in p and block_of(p) == block]
                values = [p for p in own if p.split(".")[-1] in VALUES]
                if own:
                    self.read.setdefault(expert.name, []).append((values or own)[0])
        self.bases = {
            (e.name, p): torch.linalg.svd(delta(e, p), full_matrices=False)
            for e in pool.experts
            for p in self.read[e.name]
        }
        self.paths = sorted({p for own in self.read.values() for p in own})
        plain = plain_pieces(base.tokenizer)
        more = {"decoder_input_ids": plain[:, :1]} if base.is_encoder_decoder else {}
        seen = inputs_of(base, self.paths, lambda: base.model(input_ids=plain, **more))
        self.whitening, self.toward = {}, {}
        for path in self.paths:
            x = standardised(seen[path].flatten(0, 1))
            c = torch.cov(x.T)
            w, q = torch.linalg.eigh(c + 0.3 * c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype))
            self.whitening[path] = x.mean(0), q @ torch.diag(w**-0.5) @ q.T
            inverse = torch.linalg.inv(c + c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype))
            for expert in pool.experts if means else ():
                if path in self.read[expert.name]:
                    mean = expert.signature.prompts[path].double()
                    self.toward[expert.name, path] = inverse @ (mean - x.mean(0))
        ids = _pieces(base.tokenizer)
        more = {"decoder_input_ids": ids[:, :1]} if base.is_encoder_decoder else {}
        seen = inputs_of(base, self.paths, lambda: base.model(input_ids=ids, **more))
        self.scale = {}
        for key in self.bases:
            u = seen[key[1]].flatten(0, 1)
            both = [self.norms(*key, u), *([self.along(*key, u)] if means else [])]
            self.scale[key] = [(t.mean(), t.std(correction=0)) for t in both]

    def norms(self, name, path, u):
        _, values, right = self.bases[name, path]
        v = right[values > 1e-9 * values[0]][: self.directions]
        mean, root = self.whitening[path]
        span = torch.linalg.qr((v @ root).T).Q
        return ((standardised(u) - mean) @ root @ span).norm(dim=-1) ** (2 / 3)

    def along(self, name, path, u):
        return standardised(u) @ self.toward[name, path]

    def evidence(self, ids):
        """L [T, experts] of one sequence; of an encoder's text [1, experts]."""
        more = (
            {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if self.base.is_encoder_decoder else {}
        )
        seen = inputs_of(
            self.base, self.paths, lambda: self.base.model(input_ids=torch.tensor([ids]), **more)
        )
        x = torch.stack([self._mean(e.name, seen) for e in self.pool.experts], 1)
        x[: self.skipped] = 0
        if self.base.is_encoder_decoder:
            return x.sum(0, keepdim=True)
        found = torch.zeros_like(x)
        for t in range(len(x)):
            found[t] = x[t] + (self.decay * found[t - 1] if t else 0)
        return found

    def _mean(self, name, seen):
        """z of one expert for each token, averaged over the modules that are read for it."""
        z = []
        for path in self.read[name]:
            u = seen[path][0]
            both = [self.norms(name, path, u), *([self.along(name, path, u)] if self.means else [])]
            found = [(t - m) / s for t, (m, s) in zip(both, self.scale[name, path], strict=True)]
            z.append(sum(found) / len(found))
        return sum(z) / len(z)

    def choice(self, ids):
        """The best expert of each token, int64 [T]; −1: nobody."""
        best = self.evidence(ids).argmax(-1)
        if len(best) == len(ids):
            best[: self.skipped] = -1
        return best

    def logits(self, ids, decoder_ids=None):
        """[T, vocabulary] of one sequence, with every expert's update added token by token."""
        choice = self.choice(ids)
        if self.least is not None:
            choice = choice.masked_fill(self.least(ids), -1)
        modules = modules_by_path(self.base.model, self.pool.modules)

        def hook(path):
            def add(module, args, output):
                u = args[0].double()
                best = choice.expand(u.shape[1]) if len(choice) == 1 else choice
                out = output.double().clone()
                for t, e in enumerate(best.tolist()):
                    expert = self.pool.experts[e]
                    if e >= 0 and path in expert.sizes:
                        out[:, t] += u[:, t] @ delta(expert, path).T
                return out.to(output.dtype)

            return add

        hooks = [modules[p].register_forward_hook(hook(p)) for p in self.pool.modules if p not in self.early]
        more = {"decoder_input_ids": torch.tensor([decoder_ids])} if decoder_ids is not None else {}
        with torch.no_grad():
            found = self.base.model(input_ids=torch.tensor([ids]), **more).logits[0]
        for one in hooks:
            one.remove()
        return found

    def greedy(self, ids, new):
        """Greedy decoding that recomputes everything for each token."""
        ids, written = list(ids), []
        start = [0]
        for _ in range(new):
            if self.base.is_encoder_decoder:
                token = int(self.logits(ids, start + written)[-1].argmax())
            else:
                token = int(self.logits(ids + written)[-1].argmax())
            written.append(token)
            if token == self.base.tokenizer.eos_token_id:
                break
        return written
