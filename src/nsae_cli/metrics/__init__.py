"""Every number that nsae reports about norms, reconstructions and features.

This room knows torch and arithmetic only: no disk, no command line, no language model. An accumulator takes rows in
chunks of any size, keeps sums in float64 on the host and gives its numbers in `compute()` as plain Python values that
go to JSON as they are. What is empty or undefined is None, never NaN or an infinity.

Glossary
    row            one token's activation x [d_in], its reconstruction x_hat [d_in] and its acts f [d_sae]
    norm, n        ‖x‖₂ of the raw, uncentred x, as stored (float32)
    error, e       x_hat − x
    rho, ρ         ‖e‖² / ‖x‖², the relative squared error of one row
    c, r           cos(x, x_hat), set to 0 where x_hat = 0; ‖x_hat‖ / ‖x‖. Exactly: ρ = (1 − c²) + (r − c)²
    sink, S        a row that one of three rules marks as holding an extreme norm (`sinks`)
    ns             the rows that are no sinks
    ñ, norm_scale  geometric mean of n over ns
    zero row       n < 1e-6·ñ: weight 0 in every metric, so callers leave such rows out
    group          0…9: the bin of n among the deciles of ns norms; 10: sinks (`groups`)
    scope          all, ns, sinks or one bin: where a mean or a ratio of sums is taken
    p, q           powers of 1/n in front of the squared error and of the sparsity penalty S(f) in the loss
    h              degree of S(f) under x → s·x with the autoencoder rescaled along: 1 or 0

Where a number lives
    groups          bins and scopes
    quantiles       exact quantiles of a stream of norms in bounded memory
    sinks           which rows are sinks, and where the three rules disagree
    reconstruction  l0, l1, mse, fvu, explained variance, ρ and its parts, γ, shares of the loss
    features        density, dead features, sink features, norm detectors
    norm_bias       esf, alpha_eff, nbi, nbi_rel, measured exponents, grad_share, G_b, adam_sink_share
    training_batch  the cheap subset that is logged while training
    deadness        features silent over the last training tokens
"""
