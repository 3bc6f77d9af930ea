"""Operations that no relevance may pass. Their error says what to do instead."""

from __future__ import annotations

from dynlrp.rules.operation import blocked

for _reason, _names in (
    (
        "a loss measures outputs against labels and is no sum of them: explain what goes into it, the logits",
        """
            BinaryCrossEntropyBackward0 BinaryCrossEntropyWithLogitsBackward0 CtcLossBackward0 CtcLossBackward1
            CudnnCtcLossBackward0 CudnnCtcLossBackward1 HuberLossBackward0 MiopenCtcLossBackward0
            MiopenCtcLossBackward1 MseLossBackward0 MultiMarginLossBackward0 MultilabelMarginLossBackward0
            NllLoss2DBackward0 NllLossBackward0 SmoothL1LossBackward0 SoftMarginLossBackward0
            GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_defaultBackward
            GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_no_reduction_defaultBackward
        """,
    ),
    (
        "a step of a backward pass that was recorded (create_graph=True): explain the function, not its gradient",
        """
            AdaptiveAvgPool2DBackwardBackward0 AdaptiveAvgPool3DBackwardBackward0 AdaptiveMaxPool2DBackwardBackward0
            AdaptiveMaxPool3DBackwardBackward0 AvgPool2DBackwardBackward0 AvgPool3DBackwardBackward0
            BatchNormBackwardBackward0 BinaryCrossEntropyBackwardBackward0 CdistBackwardBackward0
            ConvolutionBackwardBackward0 ConvolutionBackwardOverrideableBackward0 CudnnBatchNormBackwardBackward0
            CudnnGridSamplerBackwardBackward0 CudnnRnnBackwardBackward0 DiagonalBackwardBackward0 EluBackwardBackward0
            EmbeddingBagBackwardBackward0 EmbeddingBagDenseBackwardBackward0 EmbeddingDenseBackwardBackward0
            FractionalMaxPool2DBackwardBackward0 FractionalMaxPool3DBackwardBackward0 GeluBackwardBackward0
            GluBackwardBackward0 GridSampler2DBackwardBackward0 GridSampler2DCpuFallbackBackwardBackward0
            GridSampler3DBackwardBackward0 HardshrinkBackwardBackward0 HardswishBackwardBackward0
            HardtanhBackwardBackward0 HuberLossBackwardBackward0 LeakyReluBackwardBackward0 LinearBackwardBackward0
            LogSigmoidBackwardBackward0 LogSoftmaxBackwardDataBackward0 MaskedScatterBackwardBackward0
            MaxPool2DBackwardBackward0 MaxPool2DWithIndicesBackwardBackward0 MaxPool3DWithIndicesBackwardBackward0
            MiopenBatchNormBackwardBackward0 MpsConvolutionBackwardBackward0 MseLossBackwardBackward0
            NativeBatchNormBackwardBackward0 NativeDropoutBackwardBackward0 NativeLayerNormBackwardBackward0
            NllLoss2DBackwardBackward0 NllLossBackwardBackward0 PdistBackwardBackward0 PreluKernelBackwardBackward0
            ReflectionPad1DBackwardBackward0 ReflectionPad2DBackwardBackward0 ReflectionPad3DBackwardBackward0
            ReplicationPad1DBackwardBackward0 ReplicationPad2DBackwardBackward0 ReplicationPad3DBackwardBackward0
            RreluWithNoiseBackwardBackward0 SelectBackwardBackward0 SigmoidBackwardBackward0 SliceBackwardBackward0
            SlowConv2DBackwardBackward0 SmoothL1LossBackwardBackward0 SoftMarginLossBackwardBackward0
            SoftmaxBackwardDataBackward0 SoftplusBackwardBackward0 SoftshrinkBackwardBackward0 TanhBackwardBackward0
            ThresholdBackwardBackward0 UpsampleBicubic2DAaBackwardBackward0
            UpsampleBicubic2DBackwardBackward0 UpsampleBilinear2DAaBackwardBackward0
            UpsampleBilinear2DBackwardBackward0 UpsampleLanczos2DAaBackwardBackward0 UpsampleLinear1DBackwardBackward0
            UpsampleNearest1DBackwardBackward0 UpsampleNearest2DBackwardBackward0 UpsampleNearest3DBackwardBackward0
            UpsampleNearestExact1DBackwardBackward0 UpsampleNearestExact2DBackwardBackward0
            UpsampleNearestExact3DBackwardBackward0 UpsampleTrilinear3DBackwardBackward0
        """,
    ),
    (
        "an optimiser's kernel that works on a list of tensors, of which the graph shows too little: apply "
        "the plain operation to each tensor of the list",
        """
            ForeachAbsBackward0 ForeachAcosBackward0 ForeachAddBackward0List ForeachAddBackward0Tensor
            ForeachAddBackward1Scalar ForeachAddBackward1ScalarList ForeachAddcdivBackward0Scalar
            ForeachAddcdivBackward0ScalarList ForeachAddcmulBackward0Scalar ForeachAddcmulBackward0ScalarList
            ForeachAsinBackward0 ForeachAtanBackward0 ForeachCeilBackward0 ForeachClampMaxBackward0Scalar
            ForeachClampMaxBackward0ScalarList ForeachClampMaxBackward1List ForeachClampMinBackward0Scalar
            ForeachClampMinBackward0ScalarList ForeachClampMinBackward1List ForeachCloneBackward0 ForeachCosBackward0
            ForeachCoshBackward0 ForeachDivBackward0 ForeachDivBackward0Tensor ForeachDivBackward1Scalar
            ForeachDivBackward1ScalarList ForeachErfBackward0 ForeachErfcBackward0 ForeachExpBackward0
            ForeachExpm1Backward0 ForeachFloorBackward0 ForeachFracBackward0 ForeachLerpBackward0Scalar
            ForeachLerpBackward0ScalarList ForeachLerpBackward1List ForeachLgammaBackward0 ForeachLog10Backward0
            ForeachLog1PBackward0 ForeachLog2Backward0 ForeachLogBackward0 ForeachMaxBackward1 ForeachMaximumBackward0
            ForeachMaximumBackward0List ForeachMaximumBackward1 ForeachMinimumBackward0 ForeachMinimumBackward0List
            ForeachMinimumBackward1 ForeachMmBackward0 ForeachMulBackward0List ForeachMulBackward0Tensor
            ForeachMulBackward1Scalar ForeachMulBackward1ScalarList ForeachNegBackward0 ForeachNormBackward0
            ForeachPowBackward0 ForeachPowBackward0Scalar ForeachPowBackward1 ForeachPowBackward2
            ForeachReciprocalBackward0 ForeachRoundBackward0 ForeachRsqrtBackward0 ForeachSigmoidBackward0
            ForeachSignBackward0 ForeachSinBackward0 ForeachSinhBackward0 ForeachSqrtBackward0 ForeachSubBackward0List
            ForeachSubBackward1Scalar ForeachSubBackward1ScalarList ForeachTanBackward0 ForeachTanhBackward0
            ForeachTruncBackward0
        """,
    ),
    (
        "a random draw is not made of its inputs: call model.eval(), or draw under torch.no_grad(), which "
        "makes a constant of it",
        """
            BernoulliBackward0 BernoulliBackward1 BernoulliBackward2 CauchyBackward0 ExponentialBackward0
            GeometricBackward0 LogNormalBackward0 NormalBackward0 NormalBackward1 NormalBackward2 NormalBackward3
            PoissonBackward0 RandomBackward0 RandomBackward1 RandomBackward2 StandardGammaBackward0
            StandardGammaGradBackward0 UniformBackward0
        """,
    ),
    (
        "the factors of a matrix are no sum over its entries and often not unique (signs, order): take them "
        "of x.detach(), and they are coefficients, or explain what goes into the decomposition",
        """
            CholeskyBackward0 GeqrfBackward0 LinalgCholeskyExBackward0 LinalgEigBackward0 LinalgEighBackward0
            LinalgHouseholderProductBackward0 LinalgLstsqBackward0 LinalgLuBackward0 LinalgLuFactorExBackward0
            LinalgPinvBackward0 LinalgQrBackward0 LinalgSvdBackward0 LuUnpackBackward0 OrmqrBackward0
        """,
    ),
    (
        "the graph goes on in another process, where relevance cannot follow: explain each part in the "
        "process that it runs in",
        """
            torch::distributed::autograd::RecvRpcBackward torch::distributed::autograd::SendRpcBackward
        """,
    ),
    (
        "PyTorch has no derivative for what ran here, so the graph does not tell what it was: write it in "
        "differentiable operations (of quantised weights, dequantise the weights before the product)",
        """
            torch::autograd::DelayedError torch::autograd::Error torch::autograd::NotImplemented
            torch::autograd::WarnNotImplemented
            torch::autograd::UndefinedGrad torch::autograd::UndefinedGradBackward
        """,
    ),
    (
        "an operation for PyTorch's own tests",
        """
            TestAutogradMultipleDispatchBackward0 TestAutogradMultipleDispatchBackwardAutogradCUDA0
            TestAutogradMultipleDispatchBackwardAutogradNestedTensor0
            TestAutogradMultipleDispatchBackwardAutogradNestedTensor1 TestAutogradMultipleDispatchViewBackward0
            TestAutogradMultipleDispatchViewBackward0_copy TestAutogradMultipleDispatchViewBackwardAutogradCUDA0
            TestAutogradMultipleDispatchViewBackwardAutogradCUDA0_copy TestWarnInAutogradBackward0
        """,
    ),
):
    blocked(_reason, *_names.split())
