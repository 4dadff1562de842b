"""Teachers come from timm with the head they were trained with, and see images as they know them."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch.testing import assert_close
from torchvision.transforms.functional import normalize

from timm_ep.signals.distillation import FeatureDistillation
from timm_ep.signals.teachers import TeacherCache, TeacherEnsemble, create_teacher
from timm_ep.training.trainer import Trainer

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
IMAGENET = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def imagenet_folder(tmp_path_factory):
    """A 224-pixel model of 1000 classes as timm saves it, with random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    model = timm.create_model("resnet18", num_classes=1000)
    save_for_hf(model, folder, model_config={**IMAGENET, "num_classes": 1000}, safe_serialization="both")
    return folder


def test_a_224_pixel_teacher_of_a_32_pixel_student(imagenet_folder):
    """The features and logits of the model itself on the images as it knows them, from one pass."""
    teacher = create_teacher(f"local-dir:{imagenet_folder}", MEAN, STD)
    pixels = torch.rand(2, 3, 32, 32)
    answer = teacher(normalize(pixels, MEAN, STD))
    assert teacher.reductions == [2, 4, 8, 16, 32]
    assert teacher.channels == [64, 64, 128, 256, 512]
    assert [tuple(f.shape) for f in answer.features] == [
        (2, c, 224 // r, 224 // r) for c, r in zip(teacher.channels, teacher.reductions, strict=True)
    ]
    plain = timm.create_model(f"local-dir:{imagenet_folder}", pretrained=True).eval()
    large = F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    known = normalize(large, IMAGENET["mean"], IMAGENET["std"])
    with torch.no_grad():
        torch.testing.assert_close(answer.logits, plain(known), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(answer.features, plain.forward_intermediates(known)[1], strict=True):
            size = theirs.square().mean((1, 2, 3), keepdim=True).sqrt()
            torch.testing.assert_close(ours, theirs / size, rtol=1e-4, atol=1e-4)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for source in (tmp_path / "missing", "./missing", "missing/"):
        with pytest.raises(FileNotFoundError, match=r"There is no folder .*; give that of a run"):
            create_teacher(source, MEAN, STD)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "ep_vgg5_025", "test_efficientnet", "resnet18"])
def test_features_and_logits_are_those_of_the_model_alone(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    teacher = create_teacher(model, MEAN, STD)
    images = torch.rand(1, 3, 32, 32)
    answer = teacher(images)
    with torch.no_grad():
        torch.testing.assert_close(answer.logits, model(teacher.adapt(images)))
    assert [f.shape[1] for f in answer.features] == teacher.channels
    size = teacher.input_size[0]
    assert [f.shape[-1] for f in answer.features] == [size // r for r in teacher.reductions]


def test_any_module_teaches_its_logits():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 7))
    answer = create_teacher(model, MEAN, STD)(torch.rand(2, 3, 32, 32))
    assert answer.features == ()
    assert answer.logits.shape == (2, 7)


def test_an_ensemble_answers_with_the_mean_of_the_probabilities():
    """Each member sees the images as it knows them; one is sure of class 0, the other of nothing."""
    torch.manual_seed(0)
    models = [timm.create_model(name, num_classes=7) for name in ("test_resnet", "ep_vgg5_025")]
    members = [create_teacher(model, MEAN, STD) for model in models]
    ensemble, images = TeacherEnsemble(members), torch.rand(3, 3, 32, 32)
    answer = ensemble(images)
    expected = (
        sum(
            member(images).logits.double().exp() / member(images).logits.double().exp().sum(1, True)
            for member in members
        )
        / 2
    )
    assert answer.features == ()
    assert_close(answer.logits.exp().double(), expected, rtol=1e-5, atol=1e-6)
    assert not any(module.training for member in ensemble.train().members for module in member.modules())
    assert "shown 160×160 pixels in 3 channels; shown 32×32" in ensemble.extra_repr()
    with pytest.raises(ValueError, match="TeacherEnsemble gives no features; choose one model"):
        FeatureDistillation(models[1], ensemble)


def test_a_named_teacher_takes_arguments():
    plain, single = (
        create_teacher("ep_vgg5_025.ep_digits", (0.5,), (0.5,), model_args=args) for args in ({}, {"free_sweeps": 0})
    )
    images = torch.rand(2, 1, 32, 32)
    assert (plain.model.settings.free_sweeps, single.model.settings.free_sweeps) == (6, 0)
    assert not torch.equal(plain(images).logits, single(images).logits)
    twin = timm.create_model("ep_vgg5_025.ep_digits", pretrained=True)
    twin.gradient = "backprop"  # feedforward alone
    assert_close(single(images).logits, twin.train()(single.adapt(images)).detach())
    with pytest.raises(
        ValueError, match=r"model_args=\{'free_sweeps': 0\} are of a model to create; EpVgg exists already"
    ):
        create_teacher(plain.model, (0.5,), (0.5,), model_args={"free_sweeps": 0})


def test_a_teacher_is_frozen_and_stays_in_eval_mode():
    teacher = create_teacher(timm.create_model("test_resnet", num_classes=7), MEAN, STD)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.train()
    answer = teacher(torch.rand(4, 3, 32, 32, requires_grad=True))
    assert not any(module.training for module in teacher.modules())
    assert not any(param.requires_grad for param in teacher.parameters())
    assert not answer.logits.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_grey_images_are_shown_to_a_colour_teacher():
    teacher = create_teacher(timm.create_model("test_resnet", num_classes=7), (0.5,), (0.5,))
    assert teacher.adapt(torch.zeros(2, 1, 32, 32)).shape == (2, 3, *teacher.input_size)
    expected = (0.5 - teacher.mean.flatten()) / teacher.std.flatten()
    torch.testing.assert_close(teacher.adapt(torch.zeros(1, 1, 40, 40))[0, :, 5, 5], expected)


def test_a_teacher_of_one_size_is_shown_that_size(tmp_path):
    """A ViT for 32², and one for 64², of student's images of another size; both given and as a checkpoint."""
    torch.manual_seed(3)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, depth=1).eval()
    teacher = create_teacher(vit, MEAN, STD)
    assert teacher.input_size == (32, 32)
    assert "shown 32×32 pixels in 3 channels" in repr(teacher)
    assert teacher(torch.rand(2, 3, 48, 48)).logits.shape == (2, 7)
    with pytest.raises(ValueError, match="takes images of 32×32 pixels alone, not of img_size=64"):
        create_teacher(vit, MEAN, STD, img_size=64)

    whole = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64).eval()
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "last.pth.tar")
    images = torch.rand(2, 3, 64, 64)
    loaded = create_teacher("vit_tiny_patch16_224", MEAN, STD, tmp_path / "last.pth.tar", img_size=64)
    with torch.no_grad():
        assert_close(loaded(normalize(images, MEAN, STD)).logits, whole((images - loaded.mean) / loaded.std))
    with pytest.raises(ValueError, match=r"images of another size, give that \(img_size\)"):
        create_teacher("vit_tiny_patch16_224", MEAN, STD, tmp_path / "last.pth.tar")


def test_a_teacher_of_any_size_is_shown_what_it_was_trained_at():
    """timm's train.py at 32² leaves a checkpoint of a model whose configuration says 160."""
    model = timm.create_model("test_resnet", num_classes=7)
    assert create_teacher(model, MEAN, STD).input_size == (160, 160)
    teacher, images = create_teacher(model, MEAN, STD, img_size=32), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(teacher(normalize(images, MEAN, STD)).logits, model((images - teacher.mean) / teacher.std))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    Trainer(epochs=1, train_images=64, gradient="backprop", output=folder, quiet=True).run()
    return folder


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_a_run_has_weights_of_its_own(run, form):
    with pytest.raises(ValueError, match="comes with weights of its own, and a checkpoint"):
        create_teacher(form.format(run), (0.5,), (0.5,), run / "model.safetensors")


@pytest.mark.parametrize("form", ["{}", "local-dir:{}", "{}/model.safetensors"])
def test_a_trained_run_teaches(run, form):
    digits = [str(digit) for digit in range(10)]
    teacher = create_teacher(form.format(run), (0.5,), (0.5,), classes=digits)
    trained = timm.create_model(f"local-dir:{run}", pretrained=True)
    for name, value in trained.state_dict().items():
        assert torch.equal(teacher.model.state_dict()[name], value)


def test_weights_of_a_named_model(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "model_best.pth.tar")
    teacher = create_teacher("test_resnet", (0.5,), (0.5,), tmp_path / "model_best.pth.tar", classes=list("abcdefg"))
    for name, value in model.state_dict().items():
        assert torch.equal(teacher.model.state_dict()[name], value)


def test_other_classes_are_refused_for_logits_and_allowed_for_features(run, imagenet_folder):
    with pytest.raises(ValueError, match=r"has 1000 classes and the student 10: .*--distill-features"):
        create_teacher(f"local-dir:{imagenet_folder}", MEAN, STD, classes=[str(i) for i in range(10)])
    with pytest.raises(ValueError, match=r"\['0', '1', '2', '3', '4'\]… and the student \['9'"):
        create_teacher(str(run), (0.5,), (0.5,), classes=[str(i) for i in reversed(range(10))])
    assert create_teacher(f"local-dir:{imagenet_folder}", MEAN, STD).model.num_classes == 1000


def test_no_teacher_without_trained_weights(tmp_path):
    with pytest.raises(ValueError, match=r"model 'ep_vgg9' could not be created: .*ep_vgg9_050\.ep_cifar10"):
        create_teacher("ep_vgg9", MEAN, STD)
    with pytest.raises(ValueError, match=r"model 'resnet1' is unknown to timm; similar are .*resnet18"):
        create_teacher("resnet1", MEAN, STD)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        create_teacher(str(tmp_path), MEAN, STD)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        create_teacher("test_resnet", MEAN, STD, tmp_path / "nothing.safetensors")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds no fc\.weight"):
        create_teacher("test_resnet", MEAN, STD, tmp_path / "other.pth")
    model = timm.create_model("test_resnet", num_classes=7)
    state = model.state_dict()
    state.pop("bn1.weight")
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="does not hold the weights of test_resnet"):
        create_teacher("test_resnet", MEAN, STD, tmp_path / "part.pth")


class Unpickled:
    def __reduce__(self):
        return (pytest.fail, ("a teacher's weights were unpickled",))


def test_weights_are_never_unpickled(tmp_path):
    torch.save({"state_dict": {"head.fc.weight": Unpickled()}}, tmp_path / "evil.pth")
    (tmp_path / "text.safetensors").write_text("no weights at all")
    for name in ("evil.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is not a file of weights alone"):
            create_teacher("test_resnet", MEAN, STD, tmp_path / name)


def test_the_cache_asks_once_and_gives_the_same_answer():
    teacher = create_teacher(timm.create_model("test_resnet", num_classes=7), MEAN, STD)
    images = torch.rand(6, 3, 32, 32)
    asked = []
    teacher.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    cache = TeacherCache(teacher, images.split(4), 6)
    for indices in ([4, 0], [0, 5, 4], [1, 2, 3, 4, 5, 0]):
        answer = cache(torch.tensor(indices))
        expected = teacher(images[indices])
        asked.pop()
        for ours, theirs in zip((*answer.features, answer.logits), (*expected.features, expected.logits), strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    assert asked == [4, 2]


def test_a_cache_that_would_fill_the_memory_is_refused():
    teacher = create_teacher(timm.create_model("test_resnet", num_classes=7), MEAN, STD)
    with pytest.raises(MemoryError, match=r"10,000,000 images takes .* GiB; the limit is 8 GiB"):
        TeacherCache(teacher, [torch.rand(2, 3, 32, 32)], 10_000_000)


def test_the_features_of_a_net_at_full_feedback_are_targets_too():
    """They fall to 1e-7; the targets have variance 1 all the same, from the cache in half precision too."""
    torch.manual_seed(0)
    teacher = create_teacher(timm.create_model("ep_vgg9_025", preset="strong", num_classes=5), MEAN, STD)
    student, images = timm.create_model("ep_vgg9_025", num_classes=5), torch.rand(4, 3, 32, 32)
    distillation = FeatureDistillation(student, teacher)
    for projection in distillation.projections:
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    states = student.equilibrium(images)
    for answer in (teacher(images), TeacherCache(teacher, [images], 4)(torch.arange(4))):
        assert distillation(states, answer.features).item() == pytest.approx(len(distillation.layers), rel=0.02)


def test_weights_of_a_model_with_two_heads(tmp_path):
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3)
    save_file(model.state_dict(), tmp_path / "deit.safetensors")
    teacher = create_teacher("deit_tiny_distilled_patch16_224", MEAN, STD, tmp_path / "deit.safetensors")
    assert torch.equal(teacher.model.head_dist.weight, model.head_dist.weight)


def test_a_feature_with_one_huge_value_is_a_target_of_variance_one(monkeypatch):
    """As vision transformers have; averaged to a coarser grid too."""
    feature = torch.randn(2, 384, 14, 14)
    feature[:, 7, 3, 5] = 300
    teacher = create_teacher(timm.create_model("test_resnet", num_classes=5), MEAN, STD)
    monkeypatch.setattr(teacher.model, "forward_intermediates", lambda images: (images, [feature]))
    monkeypatch.setattr(teacher.model, "forward_head", lambda images: images.new_zeros(2, 5))
    (found,) = teacher(torch.rand(2, 3, 32, 32)).features
    for size in (14, 4, 2):
        pooled = F.adaptive_avg_pool2d(found, size)
        assert F.layer_norm(pooled, pooled.shape[1:]).var((1, 2, 3)).numpy() == pytest.approx(1, abs=0.01)


def test_a_module_of_the_users_own_sees_what_the_student_sees():
    """Nothing says that it was trained on other images; asked for another size, it is shown that."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 7)
    )
    images, (mean, std) = torch.randn(2, 3, 20, 20), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    teacher = create_teacher(model, mean, std)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).logits, model(images))
    assert teacher.extra_repr() == "shown the student's images in 3 channels"
    assert create_teacher(model, mean, std, img_size=24).adapt(images).shape == (2, 3, 24, 24)
    grey = create_teacher(model, (0.45,), (0.225,))  # for a student in grey, which it sees as colours of its own
    torch.testing.assert_close(grey.adapt(images[:, :1]), images[:, :1].expand(-1, 3, -1, -1))


def test_a_model_in_a_wrapper_is_shown_what_the_model_is():
    model = timm.create_model("test_resnet", num_classes=5)
    wrapped, plain = (create_teacher(each, MEAN, STD) for each in (torch.nn.DataParallel(model), model))
    assert wrapped.input_size == plain.input_size
    fixed = torch.nn.DataParallel(timm.create_model("test_vit", num_classes=5, img_size=64))
    assert create_teacher(fixed, MEAN, STD).input_size == (64, 64)
    with pytest.raises(ValueError, match="takes images of 64×64 pixels alone"):
        create_teacher(fixed, MEAN, STD, img_size=32)
    with pytest.raises(ValueError, match="has 5 classes and the student 2"):
        create_teacher(fixed, MEAN, STD, classes=["a", "b"])
