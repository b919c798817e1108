#!/usr/bin/env bash
# Table 4 of the paper: sequential MNIST, permuted MNIST, sequential CIFAR-10. See tables.sh for SEEDS, ROWS, SMOKE, ARGS.
. "$(dirname "${BASH_SOURCE[0]}")/tables.sh"

# 8M parameters, as the text says; the settings of Table 5 and of the released script are far smaller.
sequential_mnist() { train pmnist --preset 8m --no-permute; }
permuted_mnist() { train pmnist --preset 8m; }
sequential_cifar10() { train cifar10 --preset 8m; }
sequential_mnist_released() { train pmnist --no-permute; }
permuted_mnist_released() { train pmnist; }
sequential_cifar10_released() { train cifar10; }
# The paper's baselines.
sequential_mnist_tcn() { train pmnist --model tcn --no-permute; }
permuted_mnist_tcn() { train pmnist --model tcn; }

rows sequential_mnist permuted_mnist sequential_cifar10 \
    sequential_mnist_released permuted_mnist_released sequential_cifar10_released \
    sequential_mnist_tcn permuted_mnist_tcn
