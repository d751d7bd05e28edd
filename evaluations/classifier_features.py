"""Features from a classifier of noise-free images, for data sets on which Inception features are not meaningful."""

import torch as th
import torch.nn.functional as F


class ClassifierFeatures:
    """Replaces InceptionV3 as the feature network, using a classifier that was trained on noise-free images.

    The pool features are the inputs of the classifier's last layer, which is linear. There are no spatial features.

    :param classifier: an EncoderUNetModel.
    """

    spatial_dim = 0

    def __init__(self, classifier):
        self.classifier = classifier.eval()
        self.last = [m for m in classifier.out.modules() if getattr(m, "weight", None) is not None][-1]
        self.pool_dim = self.last.weight.shape[1]
        self.device = self.last.weight.device

    @th.inference_mode()
    def __call__(self, images):
        """Return pool features float32 [N, pool_dim] of uint8 images [N, H, W, C], and no spatial features [N, 0]."""
        seen = []
        hook = self.last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
            self.classifier(x, th.zeros(len(x), device=x.device))
        finally:
            hook.remove()
        pool = seen[0].float().flatten(2)[:, :, 0] if seen[0].ndim > 2 else seen[0].float()
        return pool, pool.new_zeros(len(pool), 0)

    @th.inference_mode()
    def logits(self, pool):
        """Return the logits [N, classes] of pool features [N, pool_dim]."""
        return F.linear(pool, self.last.weight.float().flatten(1), self.last.bias.float())
