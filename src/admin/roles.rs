//! Who may call what: the one table, and the layer in front of the control service that enforces it.
//!
//! Deny by default: the layer looks up the path of the call, so a method without a row is refused before any of its code
//! runs. The identity is what TLS found in the caller's certificate; there is no other way to be somebody.

use std::task::{Context, Poll};

use farshore_api::control::v1::control_server::SERVICE_NAME;
use farshore_api::identity::{Identity, Role};
use futures::future::{Either, Ready, ready};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

use crate::link::transport::Peer;

/// Method of the control service -> roles that may call it.
const TABLE: &[(&str, &[Role])] = &[
    // The router's answers depend on it, and a peer's status page shows it.
    ("Status", &[Role::Site, Role::Operator, Role::Viewer, Role::Router]),
    ("WatchLag", &[Role::Operator, Role::Viewer, Role::Router]),
    ("OutboxStats", &[Role::Operator, Role::Viewer]),
    // Shows the contents of documents.
    ("OutboxPeek", &[Role::Operator]),
];

/// Lets a caller with this identity call this method, or says why not.
///
/// # Errors
/// `unauthenticated` without an identity, `permission_denied` (naming the roles that may) with the wrong one.
pub fn authorize(method: &str, caller: Option<&Identity>) -> Result<(), Status> {
    let Some(caller) = caller else {
        return Err(Status::unauthenticated("no identity: connect with a client certificate of the fleet"));
    };
    let roles = TABLE.iter().find(|(name, _)| *name == method).map_or(&[][..], |(_, roles)| *roles);
    if roles.contains(&caller.role) {
        return Ok(());
    }
    let needed = match roles {
        [] => "it is open to no role".to_owned(),
        roles => {
            format!("it needs the role {}", roles.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "))
        }
    };
    Err(Status::permission_denied(format!("{method} is not open to the role {}; {needed}", caller.role)))
}

/// The layer: wraps the control service.
#[derive(Clone, Debug)]
pub struct Authorized<S> {
    inner: S,
}

impl<S> Authorized<S> {
    /// Puts the table in front of `inner`.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> NamedService for Authorized<S> {
    const NAME: &'static str = SERVICE_NAME;
}

impl<S> Service<http::Request<Body>> for Authorized<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = method_of(request.uri().path());
        match authorize(method, caller(request.extensions())) {
            Ok(()) => Either::Left(self.inner.call(request)),
            Err(status) => {
                tracing::debug!(method, reason = status.message(), "refused a control call");
                Either::Right(ready(Ok(status.into_http())))
            }
        }
    }
}

/// Who calls: what the server put into the extensions of the request when it accepted the connection.
fn caller(extensions: &http::Extensions) -> Option<&Identity> {
    let connection = || extensions.get::<Peer>().map(|peer| &peer.identity);
    extensions.get::<Identity>().or_else(connection)
}

/// The method of a path of this service; of another service, nothing that the table knows.
fn method_of(path: &str) -> &str {
    path.strip_prefix('/')
        .and_then(|path| path.strip_prefix(SERVICE_NAME))
        .and_then(|path| path.strip_prefix('/'))
        .unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROTO: &str = include_str!("../../proto/farshore/control/v1/control.proto");

    /// Every method the service defines, from the definition itself.
    fn methods() -> Vec<&'static str> {
        let calls = PROTO.lines().filter_map(|line| line.trim_start().strip_prefix("rpc "));
        calls.map(|call| call.split('(').next().expect("a name").trim()).collect()
    }

    #[test]
    fn every_method_has_exactly_one_row_and_every_row_a_method() {
        let mut rows: Vec<_> = TABLE.iter().map(|(name, _)| *name).collect();
        let mut defined = methods();
        assert!(defined.len() >= 4);
        rows.sort_unstable();
        defined.sort_unstable();
        assert_eq!(rows, defined);
    }

    #[test]
    fn contents_are_for_operators_only() {
        for role in [Role::Site, Role::Viewer, Role::Router] {
            let caller = Identity { role, name: "x".to_owned() };
            let status = authorize("OutboxPeek", Some(&caller)).expect_err("refused");
            assert_eq!(status.code(), tonic::Code::PermissionDenied);
            assert!(status.message().contains("needs the role operator"), "{}", status.message());
        }
    }

    #[test]
    fn what_is_not_in_the_table_is_refused_even_to_operators() {
        let operator = Identity { role: Role::Operator, name: "x".to_owned() };
        for path in ["/farshore.control.v1.Control/Shutdown", "/farshore.replication.v1.Link/Status", "Status", ""] {
            assert!(authorize(method_of(path), Some(&operator)).is_err(), "{path}");
        }
        assert_eq!(method_of("/farshore.control.v1.Control/Status"), "Status");
        assert_eq!(authorize("Status", None).expect_err("nobody").code(), tonic::Code::Unauthenticated);
    }
}
