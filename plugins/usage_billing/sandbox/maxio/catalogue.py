"""The catalogue of a Maxio site: components, price points, and the site itself."""

from starlette.responses import Response

from usage_billing.sandbox.wire import Call, Route, json_reply
from usage_billing.sandbox.world import Component

from .lookups import MaxioSite, NotFound, paging


class Catalogue:
    """The catalogue of one site."""

    def __init__(self, site: MaxioSite) -> None:
        self.site = site
        family = "/product_families/{family}/components"
        self.routes = (
            Route("GET", "/components/lookup", "lookup_component", self.lookup_component),
            Route("GET", "/components/{component}/price_points", "list_price_points", self.list_price_points),
            Route("GET", "/components", "list_components", self.list_components),
            Route("GET", family, "list_family_components", self.list_family_components),
            Route("GET", f"{family}/{{component}}", "read_component", self.read_component),
            Route("GET", "/site", "read_site", self.read_site),
        )

    def list_components(self, call: Call) -> Response:
        """`GET /components.json`."""
        return self._page_of_components(call, list(self.site.world.components))

    def list_family_components(self, call: Call, family: str) -> Response:
        """`GET /product_families/{id}/components.json`."""
        return self._page_of_components(call, self.site.of_family(family))

    def read_component(self, call: Call, family: str, component: str) -> Response:
        """`GET /product_families/{id}/components/{id or handle:...}.json`."""
        part = self.site.component(component)
        if part not in self.site.of_family(family):
            raise NotFound
        return json_reply(self.site.views.component(part))

    def lookup_component(self, call: Call) -> Response:
        """`GET /components/lookup.json?handle=`, without the `handle:` prefix."""
        part = self.site.component(f"handle:{call.param('handle')}")
        return json_reply(self.site.views.component(part))

    def list_price_points(self, call: Call, component: str) -> Response:
        """`GET /components/{id}/price_points.json`."""
        part = self.site.component(component)
        limit, offset = paging(call)
        kinds = call.csv("filter[type]")
        points = [self.site.views.price_point(part, point) for point in part.price_points]
        chosen = [point for point in points if not kinds or point["type"] in kinds]
        meta = {
            "total_count": len(chosen),
            "current_page": offset // limit + 1,
            "total_pages": -(-len(chosen) // limit),
            "per_page": limit,
        }
        return json_reply({"price_points": chosen[offset : offset + limit], "meta": meta})

    def read_site(self, call: Call) -> Response:
        """`GET /site.json`."""
        return json_reply(self.site.views.site())

    def _page_of_components(self, call: Call, parts: list[Component]) -> Response:
        limit, offset = paging(call)
        wanted = call.csv("filter[ids]")
        archived = call.param("include_archived") == "true"
        chosen = [p for p in parts if (archived or not p.archived) and (not wanted or str(p.id) in wanted)]
        return json_reply([self.site.views.component(part) for part in chosen[offset : offset + limit]])
