//! A minimal VMM on KVM: the worked example of an embedder of `mig`.

pub mod workload;
