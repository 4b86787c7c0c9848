pub mod compare;
pub mod workload;
