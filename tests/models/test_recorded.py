"""A model taken apart by torch's tools computes what it computes itself; where it cannot, it says so."""

import io

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close

from conftest import make_batch, make_net

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:FutureWarning")

SETTINGS = {
    "ep": {},
    "the twin": {"gradient": "backprop"},
    "zero start, max pooling": {"start": "zero", "pool": "max", "update": "synchronous", "feedback": 0.3},
    "output inside": {"readout": "state", "update": "odd-even"},
    "short products": {"products": "bfloat16"},
}


def records(model, images):
    """The model as a program (through a file), and as a trace."""
    batch = torch.export.Dim("batch", min=1)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), file)
    file.seek(0)
    return torch.export.load(file).module(), torch.jit.trace(model, images)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_exported_answers_as_the_model_for_any_batch(name):
    model = make_net(4, dtype=torch.float32, **SETTINGS[name]).eval()
    (few, _), (many, _) = (make_batch(batch=batch, dtype=torch.float32) for batch in (2, 70))
    for grad_mode in (torch.enable_grad, torch.no_grad):
        with grad_mode():
            recorded = records(model, few)
        for each in recorded:
            for images in (few, many, many[:1]):
                assert_close(each(images), model(images).detach(), rtol=1e-4, atol=1e-5)


def test_no_gradient_comes_out_of_what_is_exported():
    """Autograd through the sweeps would be BPTT under the name of EP."""
    model, (images, _) = make_net(4), make_batch()
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        torch.export.export(model, (images,))
    for recorded in records(model.eval(), images):
        with pytest.raises(RuntimeError, match="does not require grad"):
            recorded(images).sum().backward()


def test_a_tolerance_cannot_be_exported():
    model, (images, _) = make_net(4, tol=0.01).eval(), make_batch()
    with pytest.raises(ValueError, match=r"tol=0\.01 stops the sweeps.*Set tol=0"):
        torch.export.export(model, (images,))


def test_a_device_is_not_exported_as_the_ideal_net():
    model = timm.create_model("ep_vgg5_025", state_bits=6, feedback_mismatch=0.1).eval()
    with pytest.raises(ValueError, match=r"state_bits=6, feedback_mismatch=0\.1 make of it; set them to 0"):
        torch.export.export(model, (torch.rand(1, 3, 32, 32),))


def test_torchscript_is_refused():
    with pytest.raises(NotImplementedError, match=r"torch\.export"):
        torch.jit.script(make_net(4).eval())


def test_training_and_testing_settle_alike():
    """As many sweeps, to the same bits, with a gradient to come or without."""
    model, (images, _) = make_net(9, dtype=torch.float32), make_batch(dtype=torch.float32)
    training = [state.detach() for state in model.train().equilibrium(images)]
    with torch.no_grad():
        for state, other in zip(training, model.eval().equilibrium(images), strict=True):
            assert torch.equal(state, other)


@pytest.mark.parametrize("gradient", ["ep", "bptt", "backprop"])
def test_functional_calls_give_the_gradient_of_the_model(gradient):
    model, (images, labels) = make_net(4, gradient=gradient), make_batch()
    F.cross_entropy(model(images), labels).backward()
    given = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    F.cross_entropy(functional_call(model, given, (images,)), labels).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(given[name].grad, parameter.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("gradient", ["bptt", "backprop"])
def test_vmap_gives_the_exact_gradient_of_each_sample(gradient):
    model, (images, labels) = make_net(4, gradient=gradient), make_batch()
    each = vmap(grad(loss_of(model)), (None, 0, 0))(parameters(model), images, labels)
    for index in range(len(images)):
        model.zero_grad()
        F.cross_entropy(model(images[index : index + 1]), labels[index : index + 1]).backward()
        for name, parameter in model.named_parameters():
            assert_close(each[name][index], parameter.grad)


def test_vmap_and_a_tolerance_are_told_apart():
    model, (images, labels) = make_net(4, gradient="bptt", tol=0.01), make_batch()
    with pytest.raises(ValueError, match=r"tol=0\.01 looks at the states.*model\.tol = 0"):
        vmap(grad(loss_of(model)), (None, 0, 0))(parameters(model), images, labels)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_pass_without_grad_too():
    model, (images, _) = make_net(4, gradient="bptt"), make_batch()
    moved = torch.randn_like(images)
    with torch.no_grad():
        assert_close(vmap(lambda image: model(image[None])[0])(images), model(images))
        _, tangent = jvp(model, (images,), (moved,))
        step = 1e-6
        assert_close(
            tangent, (model(images + step * moved) - model(images - step * moved)) / (2 * step), rtol=1e-4, atol=1e-7
        )


def test_ep_does_not_pass_through_transforms():
    model, (images, labels) = make_net(4), make_batch()
    given = parameters(model)
    for transformed in (vmap(grad(loss_of(model)), (None, 0, 0)), vmap(loss_of(model), (None, 0, 0))):
        with pytest.raises(NotImplementedError, match=r"one sample at a time.*gradient='bptt'"):
            transformed(given, images, labels)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        grad(loss_of(model))(given, images[0], labels[0])


def parameters(model):
    return {name: value.detach() for name, value in model.named_parameters()}


def loss_of(model):
    """The loss of one sample as a function of the parameters."""

    def loss(given, image, label):
        return F.cross_entropy(functional_call(model, given, (image[None],)), label[None])

    return loss


def test_features_end_at_the_highest_tap_once_pruned():
    model = timm.create_model("ep_vgg5_025", num_classes=3, drop_rate=0.1).double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        taps, states = model.forward_intermediates(images, intermediates_only=True), model.equilibrium(images)
        for index in (2, 0):
            assert model.prune_intermediate_layers([0, index]) == [0, index]
            assert torch.equal(model.forward_features(images), taps[index])
            assert torch.equal(model.forward_intermediates(images, [0])[0], taps[index])
            assert all(map(torch.equal, model.equilibrium(images), states))
            model.reset_classifier(5, "avg")
            assert (model.num_features, model.head_hidden_size) == (taps[index].shape[1],) * 2
            assert (model.head.fc.weight.dtype, model.head.training) == (torch.float64, False)
            assert_close(model(images), model.head.fc(taps[index].mean((2, 3))))
