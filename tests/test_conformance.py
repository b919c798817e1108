"""Conformance with every number of the authors' code, also after a round trip through our files."""

import pytest
import torch
from torch.testing import assert_close

import cases
from trellisnet import ops
from trellisnet.data.corpus import batchify
from trellisnet.heads import SplitSoftmax
from trellisnet.models import TrellisClassifier
from trellisnet.training.config import RunConfig
from trellisnet.training.optim import averaged, averages, make_averaging, make_optimizer
from trellisnet.weights import authors_state_dict, load_weights, parameter_map, save_weights

FORWARD = cases.names("lm_forward")
PIXELS = cases.names("pixel") + cases.names("pixel_masks")
QUIRK = "grad_padding_idx_quirk"
GRADIENTS = cases.names("gradients", without=(QUIRK,)) + cases.names("dropout_masks")
TRAJECTORIES = cases.names("trajectory", without=("traj_sgd_asgd",))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def test_the_cases_are_all_there():
    assert len(FORWARD) == 7
    assert len(GRADIENTS) == 6
    assert len(TRAJECTORIES) == 4
    assert len(cases.names("split_cross_entropy")) == 2
    assert len(cases.names("wt103_step")) == 1
    assert len(PIXELS) == 3


@pytest.fixture(autouse=True, params=["reference", "fused"])
def backend(request, monkeypatch):
    """Run each test with every backend."""
    monkeypatch.setattr(ops, "resolve", lambda *_: request.param)


@pytest.fixture(params=["direct", "zip", "legacy"])
def loaded(request, tmp_path):
    """Return a function that loads a case's weights, directly or through a file that we wrote."""

    def load(case, suffix=".pkl", **changes):
        model = case.model(**changes)
        load_weights(model, case.file(suffix))
        if request.param == "direct":
            return model
        save_weights(model, tmp_path / "again.pkl", legacy=request.param == "legacy")
        again = case.model(**changes)
        load_weights(again, tmp_path / "again.pkl")
        return again

    return load


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name, loaded):
    case = cases.load(name)
    model, state = loaded(case).eval(), case.state()
    for i in range(len(case.meta["config"]["segment_lengths"])):
        aux_every = case.config["aux_frequency"] if case.config["aux"] else None
        with torch.no_grad():
            out = model(case.arrays[f"seg{i}_input"], state, aux_every=aux_every)
            expected = case.arrays[f"seg{i}_decoded"]
            assert_close(out.raw_output, case.arrays[f"seg{i}_raw_output"], **CLOSE)
            assert_close(case.decode(model, out.output), expected, **CLOSE)
            assert_close(model.log_prob(out.output), expected.log_softmax(-1), **CLOSE)
            assert_close(out.state[0], case.arrays[f"seg{i}_h"].squeeze(2), **CLOSE)
            assert_close(out.state[1], case.arrays[f"seg{i}_c"].squeeze(2), **CLOSE)
            if case.config["aux"]:
                aux = torch.stack([case.decode(model, a) for a in out.aux], dim=1)
                assert_close(aux, case.arrays[f"seg{i}_aux_decoded"], **CLOSE)
        state = out.state


@pytest.mark.parametrize(
    ("name", "suffix"), [(n, ".legacy.pkl") for n in FORWARD] + [("lm_plain_k2_tied", ".legacy_cuda0.pkl")]
)
def test_old_containers_hold_the_same_weights(name, suffix):
    case = cases.load(name)
    zipped, legacy = case.model(), case.model()
    load_weights(zipped, case.file())
    load_weights(legacy, case.file(suffix))
    for ours, theirs in zip(legacy.parameters(), zipped.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def check_losses(case, losses):
    for term in ("loss", "raw", "aux", "alpha", "beta"):
        assert_close(losses[term], torch.tensor(case.scalar(term)), **CLOSE)


def check_gradients(case, model, replaced=None):
    for name, parameter in parameter_map(model).items():
        expected = case.arrays[(replaced or {}).get(name, f"grad.{name}")]
        error = (parameter.grad - expected).abs().max()
        assert error <= 1e-6 + 1e-4 * expected.abs().max(), name
    if replaced is None:
        total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert_close(total, torch.tensor(case.scalar("total_grad_norm")), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", cases.names("split_cross_entropy"))
def test_split_softmax(name):
    case = cases.load(name)
    parameters = {key: torch.nn.Parameter(case.arrays[key]) for key in ("weight", "bias")}
    c = case.meta["config"]
    head = SplitSoftmax(c["hidden_size"], c["ntoken"], c["splits"], **parameters)
    with torch.no_grad():
        head.tail_vectors.copy_(case.arrays["tail_vectors"])
        head.tail_bias.copy_(case.arrays["tail_bias"])
    assert_close(head.log_prob(case.arrays["hiddens"]), case.arrays["logprob"], **CLOSE)
    kinds = [key.removeprefix("targets_") for key in case.arrays if key.startswith("targets_")]
    assert len(kinds) == 6
    for kind in kinds:
        head.zero_grad()
        x = case.arrays["hiddens"].clone().requires_grad_()
        loss = head.loss(x, case.arrays[f"targets_{kind}"])
        loss.backward()
        assert_close(loss, torch.tensor(case.scalar(f"loss_{kind}")), **CLOSE)
        gradients = {"w": head.weight, "b": head.bias, "h": x, "tv": head.tail_vectors, "tb": head.tail_bias}
        for short, tensor in gradients.items():
            if (key := f"grad{short}_{kind}") in case.arrays:
                expected = case.arrays[key]
                assert (tensor.grad - expected).abs().max() <= 1e-6 + 1e-4 * expected.abs().max(), key


@pytest.mark.parametrize("name", cases.names("wt103_step"))
def test_step_with_a_split_softmax(name, tmp_path):
    case = cases.load(name)
    model = case.model()
    with pytest.raises(ValueError, match=r"criterion.tail_vectors: .* pass init_tail=True"):
        load_weights(model, case.file())
    assert load_weights(model, case.file(), init_tail=True) == ["criterion.tail_vectors", "criterion.tail_bias"]
    with torch.no_grad():
        model.head.tail_vectors.copy_(case.arrays["tail_vectors"])
        model.head.tail_bias.copy_(case.arrays["tail_bias"])
    assert list(parameter_map(model))[:-2] == case.meta["parameters"]
    written = {name: list(tensor.shape) for name, tensor in authors_state_dict(model).items()}
    assert list(written.items())[:-2] == list(case.meta["state_dict"].items())
    assert list(written)[-2:] == ["criterion.tail_vectors", "criterion.tail_bias"]

    for legacy in (False, True):  # the tail vectors are saved too
        save_weights(model, tmp_path / "w.pkl", legacy=legacy)
        again = case.model().train()
        assert load_weights(again, tmp_path / "w.pkl") == []
        losses, _ = run_case(case, again)
        for term in ("loss", "raw", "aux"):
            assert_close(losses[term], torch.tensor(case.scalar(term)), **CLOSE)
        check_gradients(case, again)
        norms = torch.stack([p.grad.norm() for p in parameter_map(again).values()])
        assert_close(norms, case.arrays["grad_norms"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("container", [".pkl", ".legacy.pkl"])
@pytest.mark.parametrize("name", PIXELS)
def test_classifier(name, container, tmp_path):
    """Log-probabilities, state and gradients, by the full computation and by that of the last step alone."""
    case = cases.load(name)
    c = {"dropout": 0, "dropouti": 0, "dropouth": 0, "wdrop": 0} | case.config
    model = TrellisClassifier(
        c["ninp"],
        10,
        c["nhid"] + c["nout"],
        c["nlevels"],
        output_size=c["nout"],
        input_dropout=c["dropouti"],
        output_dropout=c["dropout"],
        kernel_size=c["kernel_size"],
        dilation=c["dilation"],
        weight_norm=c["wnorm"],
        hidden_dropout=c["dropouth"],
        weight_dropout=c["wdrop"],
    )
    load_weights(model, case.file(container))
    save_weights(model, tmp_path / "again.pkl", legacy="legacy" in container)
    load_weights(model, tmp_path / "again.pkl")
    assert list(parameter_map(model)) == case.meta["parameters"]
    written = {name: list(tensor.shape) for name, tensor in authors_state_dict(model).items()}
    assert list(written.items()) == list(case.meta["state_dict"].items())

    inputs, targets = case.arrays["inputs"].transpose(1, 2), case.arrays["targets"]
    explicit = case.masks()
    masks = explicit._replace(input=explicit.input.transpose(1, 2)) if explicit.input is not None else None
    for lengths in (None, torch.full((inputs.size(0),), inputs.size(1))):
        model.zero_grad()
        out = model(inputs, case.state(), lengths=lengths, masks=masks)
        log_prob = out.logits.log_softmax(-1)
        torch.nn.functional.nll_loss(log_prob, targets).backward()
        assert_close(log_prob, case.arrays["logprob"], **CLOSE)
        assert_close(out.state[0], case.arrays["h"].squeeze(2), **CLOSE)
        assert_close(out.state[1], case.arrays["c"].squeeze(2), **CLOSE)
        check_gradients(case, model, {})


def run_case(case, model):
    tokens = case.arrays["tokens"]
    masks = case.masks() if case.meta["kind"] == "dropout_masks" else None
    losses, state = case.language_modeling(model).loss(tokens[:-1].T, tokens[1:].T, case.state(), masks)
    losses["loss"].backward()
    return losses, state


@pytest.mark.parametrize("name", GRADIENTS)
def test_losses_and_gradients(name, loaded):
    case = cases.load(name)
    model = loaded(case).train()
    losses, _ = run_case(case, model)
    check_losses(case, losses)
    check_gradients(case, model)


@pytest.mark.parametrize("name", cases.names("dropout_masks"))
def test_outputs_under_explicit_masks(name):
    case = cases.load(name)
    model = case.model()
    load_weights(model, case.file())
    model.eval()  # explicit masks act in evaluation mode too
    tokens, skip = case.arrays["tokens"], case.meta["eff_history"]
    with torch.no_grad():
        out = model(tokens[:-1].T, case.state(), aux_every=case.config["aux_frequency"], masks=case.masks())
        assert_close(out.raw_output, case.arrays["raw_output"], **CLOSE)
        assert_close(out.output, case.arrays["output"], **CLOSE)
        assert_close(case.decode(model, out.output, case.masks().latent), case.arrays["decoded"], **CLOSE)
        assert_close(out.state[0], case.arrays["h"].squeeze(2), **CLOSE)
        assert_close(out.state[1], case.arrays["c"].squeeze(2), **CLOSE)
        latent = case.masks().latent_aux
        latent = [None] * len(out.aux) if latent is None else latent.unbind(1)
        decoded = [case.decode(model, a[:, skip:], mask) for a, mask in zip(out.aux, latent, strict=True)]
        aux = torch.stack([d.transpose(0, 1).flatten(0, 1) for d in decoded])
        assert_close(aux, case.arrays["aux_final_decoded"], **CLOSE)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_of_the_last_word(frozen, loaded):
    case = cases.load(QUIRK)
    model = loaded(case, freeze_last_embedding=frozen).train()
    losses, _ = run_case(case, model)
    check_losses(case, losses)
    check_gradients(case, model, None if frozen else {"encoder.weight": "grad_noquirk.encoder.weight"})


@pytest.mark.filterwarnings("ignore:repackaging with seq_len")  # the authors' literal rule, in one case
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_training_trajectory(name, loaded):
    case = cases.load(name)
    model = loaded(case, ".init.pkl").train()
    task, config = case.language_modeling(model), case.meta["config"]
    train = batchify(case.arrays["train_stream"], config["batch"])
    held_out = batchify(case.arrays["eval_stream"], config["eval_batch"])
    assert task.evaluate(held_out)["loss"] == pytest.approx(case.scalar("eval_loss_initial"), abs=1e-4)

    settings = config["optimizer"]
    optimizer = make_optimizer(
        model.parameters(), RunConfig(optim=settings["name"], lr=settings["lr"], wdecay=settings["weight_decay"])
    )
    state = None
    for i, (start, inputs, targets) in enumerate(task.windows(train)):
        assert (start, inputs.size(1)) == (case.arrays["window_start"][i], case.arrays["window_rows"][i])
        optimizer.zero_grad()
        losses, state = task.loss(inputs, targets, state)
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["args"]["clip"])
        optimizer.step()
        for term in ("loss", "raw", "aux", "alpha", "beta"):
            if f"step_{term}" in case.arrays:
                assert_close(losses[term].detach(), case.arrays[f"step_{term}"][i], atol=1e-4, rtol=0)
        assert_close(norm, case.arrays["step_grad_norm"][i], atol=1e-4, rtol=1e-3)
    assert i + 1 == len(case.arrays["step_loss"])

    assert task.evaluate(held_out)["loss"] == pytest.approx(case.scalar("eval_loss_final"), abs=1e-4)
    if not case.file(".final.pkl").exists():
        return  # this case stores no weights
    final = case.model()
    load_weights(final, case.file(".final.pkl"))
    for ours, theirs in zip(model.parameters(), final.parameters(), strict=True):
        assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_averaged_sgd(tmp_path):
    """One epoch of SGD, then one of averaged SGD, as the authors' --asgd does after a plateau."""
    case = cases.load("traj_sgd_asgd")
    model = case.model()
    load_weights(model, case.file(".init.pkl"))
    task, config = case.language_modeling(model), case.meta["config"]
    train = batchify(case.arrays["train_stream"], config["batch"])
    held_out = batchify(case.arrays["eval_stream"], config["eval_batch"])
    settings = RunConfig(optim="SGD", lr=config["optimizer"]["lr"], wdecay=config["optimizer"]["weight_decay"])

    def close(name):
        assert task.evaluate(held_out)["loss"] == pytest.approx(case.scalar(name), abs=1e-4)

    step = 0
    close("eval_loss_initial")
    for make in (make_optimizer, make_averaging):
        optimizer = make(model.parameters(), settings)
        for inputs, targets in task.batches(train):
            optimizer.zero_grad()
            losses, _ = task.loss(inputs, targets)
            losses["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["args"]["clip"])
            optimizer.step()
            assert_close(losses["loss"].detach(), case.arrays["step_loss"][step], atol=1e-4, rtol=0)
            assert_close(norm, case.arrays["step_grad_norm"][step], atol=1e-4, rtol=1e-3)
            step += 1
        close("eval_loss_after_sgd" if make is make_optimizer else "eval_loss_raw_after_asgd")
    assert step == len(case.arrays["step_loss"])
    raw = [p.detach().clone() for p in model.parameters()]
    final = case.model()
    load_weights(final, case.file(".final.pkl"))
    with averaged(averages(optimizer)):
        close("eval_loss_final")
        for ours, theirs in zip(model.parameters(), final.parameters(), strict=True):
            assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), raw, strict=True))  # restored afterwards


@pytest.mark.parametrize("name", FORWARD + GRADIENTS + [QUIRK])
def test_names_and_order_of_the_layout(name):
    case = cases.load(name)
    model = case.model()
    assert list(parameter_map(model)) == case.meta["parameters"]
    assert {id(p) for p in parameter_map(model).values()} == {id(p) for p in model.parameters()}
    written = {name: list(tensor.shape) for name, tensor in authors_state_dict(model).items()}
    assert list(written.items()) == list(case.meta["state_dict"].items())
