"""What every adapter promises beside its pipeline: guidance, rows, block stacks, names, models read from a folder."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from sencache import CachedField, SensitivityProfile, calibrate
from sencache.adapters.cogvideox import CogVideoXField
from sencache.adapters.ltx import LTXField
from sencache.adapters.sit import SiTField
from sencache.adapters.wan import WanExperts, WanField, WanListField
from solvers import DPMSolverPP, Euler, grids, integrate
from tests import tiny
from tests.test_sit import NET
from tests.tiny import drawn

B = 3
PROMPT, NEGATIVE = drawn(B, 7, 16, seed=1), drawn(B, 7, 16, seed=2)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)
HELD = torch.arange(12).expand(B, -1) < torch.tensor([4, 4, 2])[:, None]
Y = torch.tensor([0, 2, 1])
MASK = (torch.arange(7) < torch.tensor([7, 5, 2])[:, None]).float()


class ListBlock(nn.Module):
    """A block called as the official code's is: tokens by position, everything else by name."""

    def __init__(self, dim):
        super().__init__()
        self.mix, self.text = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, e, seq_lens, context):
        inside = torch.arange(x.shape[1]) < seq_lens[:, None]
        pooled = (x * inside[..., None]).sum(1, keepdim=True) / seq_lens[:, None, None]
        return x + torch.tanh(self.mix(x + pooled) * e[:, None] + self.text(context).sum(1, keepdim=True))


class ListModel(nn.Module):
    """A small module of the call shape of the official `WanModel`: lists in, a list out, times (B,)."""

    patch_size = (1, 2, 2)

    def __init__(self, channels=4, beside=0, dim=8, layers=2):
        super().__init__()
        self.embed = nn.Conv3d(channels + beside, dim, self.patch_size, stride=self.patch_size)
        self.time, self.context = nn.Linear(2, dim), nn.Linear(16, dim)
        self.blocks = nn.ModuleList(ListBlock(dim) for _ in range(layers))
        self.head = nn.Linear(dim, channels * 4)
        self.called = []

    def forward(self, x, t, context, seq_len, clip_fea=None, y=None):
        assert [type(x), type(context)] == [list, list]
        self.called.append((len(x), tuple(t.shape), t.dtype, seq_len))
        if y is not None:
            x = [torch.cat([u, v]) for u, v in zip(x, y, strict=True)]
        patches = [self.embed(u[None]) for u in x]
        lens = torch.tensor([u[0, 0].numel() for u in patches])
        tokens = [u.flatten(2).transpose(1, 2) for u in patches]
        tokens = torch.cat([nn.functional.pad(u, (0, 0, 0, seq_len - u.shape[1])) for u in tokens])
        text = torch.stack([nn.functional.pad(self.context(u), (0, 0, 0, 9 - len(u))) for u in context])
        e = self.time(torch.stack([torch.sin(t / 300), torch.cos(t / 300)], -1).float())
        for block in self.blocks:
            tokens = block(tokens, e=e, seq_lens=lens, context=text)
        out = self.head(tokens * (1 + e[:, None]))
        return [self.unpatch(u[:n], p.shape[2:]) for u, n, p in zip(out, lens, patches, strict=True)]

    def unpatch(self, tokens, grid):
        f, h, w = grid
        return tokens.view(f, h, w, -1, 2, 2).permute(3, 0, 1, 4, 2, 5).reshape(-1, f, 2 * h, 2 * w)


def list_model(**shape):
    torch.manual_seed(0)
    return ListModel(**shape).requires_grad_(False)


def listed(prompts):
    return [prompt[: 3 + k] for k, prompt in enumerate(prompts)]  # of different lengths


def wan(guidance=4.0, model=None, **more):
    return WanField(model or tiny.wan(), PROMPT, negative=NEGATIVE, guidance=guidance, **more)


def wan_image(guidance=4.0, **more):
    beside = {"condition": drawn(B, 5, 3, 4, 4, seed=4), "image": drawn(B, 3, 16, seed=5)}
    return wan(guidance, tiny.wan(beside=5, image=16), **beside, **more)


def wan_list(guidance=4.0, **more):
    return WanListField(list_model(), listed(PROMPT), negative=listed(NEGATIVE), guidance=guidance, **more)


def wan_list_image(guidance=4.0, **more):
    beside = {"condition": drawn(B, 5, 3, 4, 4, seed=4), "image": drawn(B, 3, 16, seed=5)}
    prompts = {"prompt": listed(PROMPT), "negative": listed(NEGATIVE)}
    return WanListField(list_model(beside=5), **prompts, guidance=guidance, **beside, **more)


def experts(guidance=4.0, **more):
    low = wan(2.0 if guidance != 1 else 1, tiny.wan(1), **more)
    return WanExperts(wan(guidance, **more), low, 0.5)


def ltx(guidance=3.0, **more):
    prompts = {"prompt": PROMPT, "mask": MASK, "negative": NEGATIVE, "negative_mask": MASK.flip(0)}
    shape = {"num_frames": 3, "height": 2, "width": 2, "scale": (8 / 24, 32, 32)}
    return LTXField(tiny.ltx(), **prompts, **shape, guidance=guidance, **more)


def cogvideox(guidance=6.0, **more):
    return CogVideoXField(tiny.cogvideox(rotary=False), PROMPT, ALPHAS, negative=NEGATIVE, guidance=guidance, **more)


def sit(guidance=2.0, **more):
    return SiTField(NET, Y, guidance=guidance, data_at=0)


SHAPES = {
    wan: (4, 3, 4, 4),
    wan_image: (4, 3, 4, 4),
    wan_list: (4, 3, 4, 4),
    wan_list_image: (4, 3, 4, 4),
    experts: (4, 3, 4, 4),
    ltx: (12, 8),
    cogvideox: (3, 4, 8, 8),
    sit: (1, 8, 8),
}
EVERY = {make.__name__: make for make in SHAPES}
EVERY["wan, a frame held"] = lambda guidance=4.0, **more: wan(guidance, held=torch.tensor([True, False, False]), **more)
EVERY["ltx, tokens held"] = lambda guidance=3.0, **more: ltx(guidance, held=HELD.float(), **more)
LIKE = {"wan, a frame held": wan, "ltx, tokens held": ltx}
over_adapters = pytest.mark.parametrize("adapter", EVERY)


def state(adapter, seed=3):
    return drawn(B, *SHAPES[LIKE.get(adapter, EVERY[adapter])], seed=seed)


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


@over_adapters
def test_guidance_in_one_batch_is_guidance_in_two_and_that_of_hand(adapter):
    make, x = EVERY[adapter], state(adapter)
    one, two = (make(batched=batched) for batched in (True, False))
    close(one(x, 0.7), two(x, 0.7))
    if adapter in ("sit", "experts"):
        return
    given, weight = make(guidance=1.0), one.guidance
    assert len(given.sides) == 1
    none = make(guidance=1.0)
    none.sides = [one.sides[1]]
    close(one(x, 0.7), none(x, 0.7) + weight * (given(x, 0.7) - none(x, 0.7)))
    assert (given(x, 0.7) - none(x, 0.7)).abs().max() > 1e-2


@over_adapters
@pytest.mark.parametrize("rows", [[0], [2, 1], [0, 1, 2]], ids=str)
def test_selected_rows_are_rows_of_the_whole(adapter, rows):
    field, x, rows = EVERY[adapter](), state(adapter), torch.tensor(rows)
    few = field.select(rows)
    for t in (0.3, 0.7):
        close(few(x[rows], t), field(x, t)[rows])
    assert (few.fingerprint, few.path) == (field.fingerprint, field.path)
    close(field(x, 0.7), EVERY[adapter]()(x, 0.7))  # and the whole is what it was


@over_adapters
def test_each_sample_may_stand_at_its_own_time(adapter):
    field, x, t = EVERY[adapter](), state(adapter), torch.tensor([0.6, 0.7, 0.9])
    alone = [field.select(torch.tensor([b]))(x[[b]], t[b].item()) for b in range(B)]
    close(field(x, t), torch.cat(alone))


@over_adapters
def test_a_time_in_any_form_is_the_same_time(adapter):
    field, x = EVERY[adapter](), state(adapter)
    forms = [0.75, torch.tensor(0.75), torch.tensor(0.75).double(), torch.full((B,), 0.75), torch.tensor([0.75])]
    for t in forms:
        v = field(x, t)
        assert (v.shape, v.dtype) == (x.shape, x.dtype)
        assert torch.equal(v, field(x, forms[0]))


@over_adapters
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batched", [True, False])
def test_the_head_on_the_stack_is_the_field(adapter, guidance, batched):
    field, x = EVERY[adapter](guidance=guidance, batched=batched), state(adapter)
    for t in (0.3, 0.7):
        stack = field.stack(x, t)
        assert len(stack) == (1 if guidance == 1 else 2)
        assert all(len(part) == B and part.ndim == 3 for part in stack)
        close(field.head(x, t, stack), field(x, t))
        moved = tuple(1.5 * part for part in stack)
        assert (field.head(x, t, moved) - field(x, t)).abs().max() > 1e-3


@over_adapters
def test_rows_of_a_stack_are_the_stacks_of_the_rows(adapter):
    field, x, rows = EVERY[adapter](), state(adapter), torch.tensor([2, 0])
    whole, few = field.stack(x, 0.7), field.select(rows).stack(x[rows], 0.7)
    for one, other in zip(whole, few, strict=True):
        close(one[rows], other)


@over_adapters
@pytest.mark.parametrize("payload", ["output", "blocks"])
def test_it_is_calibrated_and_cached_each_sample_alone(adapter, payload):
    field, x, ts = EVERY[adapter](), state(adapter), grids.uniform(12, 1.0, 0.05)
    stepper = DPMSolverPP(field.path, 1) if adapter == "cogvideox" else Euler()
    profile = calibrate(field, x, ts, stepper, secants=False, progress=False)
    cached = CachedField(field, profile, nfe=6, payload=payload)
    end = cached.integrate(x, ts, stepper)
    assert cached.report.evaluations.tolist() == [6] * B
    alone = CachedField(field.select(torch.tensor([1])), profile, nfe=6, payload=payload)
    close(alone.integrate(x[[1]], ts, stepper), end[[1]], 1e-3)
    exact = CachedField(field, tolerance=0.0, payload=payload).integrate(x, ts, stepper)
    close(exact, integrate(field, x, ts, stepper), 1e-3)


def test_what_is_held_stays_and_does_not_move():
    frames, tokens = EVERY["wan, a frame held"](), EVERY["ltx, tokens held"]()
    x = state("wan")
    assert not frames(x, 0.7)[:, :, 0].any()
    assert frames(x, 0.7)[:, :, 1:].abs().min() > 0
    v = tokens(state("ltx"), 0.7)
    assert torch.equal(v.abs().sum(-1) == 0, HELD)


def test_tokens_may_stand_at_times_of_their_own():
    field, x = ltx(), state("ltx")
    t = torch.full((B, 12), 0.7)
    close(field(x, t), field(x, 0.7))
    assert (field(x, t.where(HELD, 0.3)) - field(x, 0.7)).abs().max() > 1e-3
    close(field(x, t * ~HELD)[~HELD], ltx(held=HELD)(x, 0.7)[~HELD])


def test_the_official_model_is_called_as_it_wants_to_be():
    model = list_model()
    field = WanListField(model, listed(PROMPT), negative=listed(NEGATIVE), guidance=4.0, integer=True)
    field(state("wan"), 0.7509)
    assert model.called == [(3, (3,), torch.int64, 12)] * 2
    x, t = state("wan"), torch.tensor([750])
    alone = [torch.stack(model([x[b]], t=t, context=[listed(PROMPT)[b]], seq_len=12)) for b in range(B)]
    close(WanListField(model, listed(PROMPT), integer=True)(x, 0.7509), torch.cat(alone))


def test_cogvideox_sees_an_image_beside_x_and_its_ofs_number():
    """By hand: the pipeline for it wants a VAE."""
    model, beside = tiny.cogvideox(rotary=False, beside=4, ofs_embed_dim=8), drawn(B, 3, 4, 8, 8, seed=4)
    field, x = CogVideoXField(model, PROMPT, ALPHAS, condition=beside, ofs=2.0), state("cogvideox")
    n = torch.full((B,), 699)
    out = model(torch.cat([x, beside], 2), PROMPT, n, ofs=torch.tensor([2.0]), return_dict=False)[0]
    close(field(x, 0.7), field.path.coefficients(0.7).determinant.float() * out)
    other = CogVideoXField(model, PROMPT, ALPHAS, condition=beside, ofs=1.0)
    assert (other(x, 0.7) - field(x, 0.7)).abs().max() > 1e-3
    close(field.head(x, 0.7, field.stack(x, 0.7)), field(x, 0.7))


@pytest.mark.parametrize("grid", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [50, 30, 7])
def test_cogvideox_is_handed_the_scheduler_s_own_timesteps(steps, grid):
    scheduler = tiny.cogvideox_ddim()
    scheduler.set_timesteps(steps)
    ts = (scheduler.timesteps.to(grid) + 1) / 1000
    assert cogvideox().timestep(ts).tolist() == scheduler.timesteps.tolist()
    assert cogvideox().timestep(torch.tensor([0.0, 0.5004])).tolist() == [0.0, pytest.approx(499.4, abs=1e-3)]


def test_the_official_model_is_handed_a_time_for_each_token_where_frames_are_held():
    class Tokens(ListModel):
        def forward(self, x, t, context, seq_len):
            self.times = t
            return super().forward(x, t.amax(1), context, seq_len)

    torch.manual_seed(0)
    model = Tokens().requires_grad_(False)
    field = WanListField(model, listed(PROMPT), held=torch.tensor([1, 0, 0]))
    v = field(state("wan"), 0.75)
    assert model.times.tolist() == [[0.0] * 4 + [750.0] * 8] * B
    assert torch.equal(v.abs().amax((0, 1, 3, 4)) > 0, torch.tensor([False, True, True]))


# two experts


@pytest.mark.parametrize("payload", ["output", "blocks"])
def test_a_cached_run_never_bridges_the_experts(payload):
    """The first query after the change is evaluated, and the run is that of two fields one after the other."""
    field, x, ts = experts(), state("experts"), grids.uniform(12, 1.0, 0.05)
    profile = SensitivityProfile(torch.linspace(1, 0, 20), torch.zeros(20), torch.zeros(20))  # anything goes
    options = {"profile": profile, "tolerance": 1.0, "max_reuses": 3, "payload": payload}
    k = int(field.regime(ts[:-1]).sum())
    cached = CachedField(field, **options)
    end = cached.integrate(x, ts)
    assert not cached.report.trace[k].reused.any()
    assert cached.report.trace[k - 1].reused.all()
    half = CachedField(field.high, **options).integrate(x, ts[: k + 1])
    close(CachedField(field.low, **options).integrate(half, ts[k:]), end, 1e-3)


def test_samples_on_both_sides_of_one_call_are_refused():
    with pytest.raises(ValueError, match=r"one side of t = 0.5; got tensor\(\[0.6000, 0.4000, 0.7000\]\)"):
        experts()(state("experts"), torch.tensor([0.6, 0.4, 0.7]))


# names and folders

OTHERS = {
    "other weights": lambda: wan(model=tiny.wan(7)),
    "other guidance": lambda: wan(guidance=5.0),
    "no guidance": lambda: wan(guidance=1.0),
    "integers": lambda: wan(integer=True),
    "a frame held": EVERY["wan, a frame held"],
    "two experts": experts,
    "ltx": ltx,
    "ltx, tokens held": EVERY["ltx, tokens held"],
    "cogvideox": cogvideox,
}


def test_the_fingerprint_names_what_changes_the_output_and_not_the_prompt():
    names = {make().fingerprint for make in OTHERS.values()} | {wan().fingerprint}
    assert len(names) == len(OTHERS) + 1
    assert WanField(tiny.wan(), NEGATIVE, negative=PROMPT, guidance=4.0).fingerprint == wan().fingerprint
    assert wan(batched=True).fingerprint == wan().fingerprint
    other = CogVideoXField(tiny.cogvideox(rotary=False), PROMPT, ALPHAS**1.1, negative=NEGATIVE, guidance=6.0)
    assert other.fingerprint != cogvideox().fingerprint


@pytest.mark.parametrize("adapter", ["wan", "ltx", "cogvideox"])
def test_a_transformer_from_a_folder_has_the_fingerprint_of_the_one_that_was_saved(adapter, tmp_path):
    field, x = EVERY[adapter](), state(adapter)
    field.model.save_pretrained(tmp_path)
    loaded = type(field.model).from_pretrained(tmp_path).eval().requires_grad_(False)
    again = EVERY[adapter]()
    again.model = loaded
    assert torch.equal(again(x, 0.7), field(x, 0.7))
    built = {
        "wan": lambda: wan(model=loaded),
        "ltx": lambda: LTXField(
            loaded,
            PROMPT,
            MASK,
            negative=NEGATIVE,
            negative_mask=MASK,
            guidance=3.0,
            num_frames=3,
            height=2,
            width=2,
            scale=(8 / 24, 32, 32),
        ),
        "cogvideox": lambda: CogVideoXField(loaded, PROMPT, ALPHAS, negative=NEGATIVE, guidance=6.0),
    }[adapter]()
    assert built.fingerprint == field.fingerprint
    profile = calibrate(field, x, grids.uniform(4, 1.0, 0.1), secants=False, progress=False)
    CachedField(built, profile, nfe=2)  # a profile of the one fits the other


# the model is left alone


@pytest.mark.parametrize("adapter", ["wan", "ltx", "cogvideox", "sit", "wan_list"])
def test_neither_a_stack_nor_a_failing_head_touches_the_model(adapter):
    field, x = EVERY[adapter](), state(adapter)
    before, names, kind = field(x, 0.7), list(field.model.state_dict()), type(field.model)
    stack, blocks = field.stack(x, 0.7), getattr(field.model, field.BLOCKS)
    with pytest.raises(RuntimeError):
        field.head(x, 0.7, tuple(part[:, :, :3] for part in stack))
    field.head(x, 0.7, stack)
    assert getattr(field.model, field.BLOCKS) is blocks
    assert list(field.model.state_dict()) == names
    assert type(field.model) is kind
    assert torch.equal(field(x, 0.7), before)


def test_threads_that_share_a_model_do_not_meet():
    field, x = wan(), state("wan")
    stacks = [tuple(k * part for part in field.stack(x, 0.7)) for k in range(4)]
    alone = [field.head(x, 0.7, stack) for stack in stacks]

    def often(k):
        return all(torch.equal(field.head(x, 0.7, stacks[k]), alone[k]) for _ in range(15))

    with ThreadPoolExecutor(5) as pool:
        bare = [pool.submit(lambda: torch.equal(field(x, 0.7), field(x, 0.7))) for _ in range(5)]
        assert all(pool.map(often, range(4)))
        assert all(one.result() for one in bare)


def test_a_forward_bound_to_the_model_is_noticed():
    """As hooks that offload the whole model bind it: the twin's call would run the model's own blocks."""
    field, x = wan(model=copy.deepcopy(tiny.wan())), state("wan")
    stack, bound = field.stack(x, 0.7), field.model.forward
    field.model.forward = lambda *args, **kwargs: bound(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"ran 0 times through `blocks`.*bound to the model itself"):
        field.head(x, 0.7, stack)


def test_a_model_in_half_precision_moves_a_state_in_full():
    field, full, x = wan(model=copy.deepcopy(tiny.wan()).bfloat16()), wan(), state("wan")
    field.sides = [{name: part.bfloat16() for name, part in side.items()} for side in field.sides]
    v = field(x, 0.7)
    assert v.dtype == torch.float32
    assert (v - full(x, 0.7)).abs().max() < 0.1 * full(x, 0.7).abs().max()
    close(field.head(x, 0.7, field.stack(x, 0.7)), v, 1e-6)  # what blocks add is kept wide enough to be exact


ERRORS = {
    "another batch": (lambda: wan()(state("wan")[:2], 0.5), ValueError, r"for 3 samples, and x holds 2"),
    "no negative": (lambda: WanField(tiny.wan(), PROMPT, guidance=4.0), ValueError, r"guidance of 4.*`negative`"),
    "two batches": (
        lambda: WanField(tiny.wan(), PROMPT, negative=NEGATIVE[:1], guidance=4.0),
        ValueError,
        r"as many samples; got \{'prompt': 1\}",
    ),
    "boundary": (lambda: WanExperts(wan(), wan(), 875), ValueError, r"sigma between 0 and 1.*got 875"),
    "blocks": (
        lambda: SiTField(nn.Identity(), torch.tensor([0])).stack(torch.ones(1, 1, 2, 2), 0.5),
        TypeError,
        "`blocks`",
    ),
}


@pytest.mark.parametrize(("wrong", "kind", "words"), ERRORS.values(), ids=ERRORS)
def test_wrong_arguments_are_named(wrong, kind, words):
    with pytest.raises(kind, match=words):
        wrong()
