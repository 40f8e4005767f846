"""Parts of a dashboard: panels with their queries, variables, links and annotations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models import prometheus as prometheus_models

SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
CLUSTER = 'headrace_cluster="$cluster"'
"""Matcher for series that belong to the whole cluster."""
MODEL = f'{CLUSTER},model=~"$model"'
"""Matcher for series that have a model."""
RUNBOOKS = "docs/runbooks"
"""Folder of the runbooks. In links, the chart replaces this path by `monitoring.alerts.runbookUrl`."""
BOARDS = {
    "overview": "Overview",
    "model": "Model",
    "tenant": "Tenant",
    "workers": "Workers and nodes",
    "routing": "Routing and cache",
    "fairness": "Fairness",
    "cost": "Cost",
    "canary": "Canary",
}
COLUMNS = 24
"""Width of Grafana's grid."""
GREEN, YELLOW, RED = "green", "orange", "red"
Steps = Sequence[tuple[float | None, str]]
Query = tuple[str, str]
"""A PromQL query and its legend."""

BAD_ABOVE_ZERO: Steps = ((None, GREEN), (1, RED))
BAD_BELOW_ONE: Steps = ((None, RED), (1, GREEN))


def rate(metric: str, by: str, matcher: str = MODEL) -> str:
    """Return the query for the rate of a counter, summed by the labels `by`. `matcher`: selects the series."""
    return f"sum by ({by}) (rate({metric}{{{matcher}}}[$__rate_interval]))"


def quantile(share: float, metric: str, by: str = "model", matcher: str = MODEL) -> str:
    """Return the query for the quantile `share` of a histogram, by the labels `by`. `matcher`: selects the series."""
    return f"histogram_quantile({share}, sum by ({by}, le) (rate({metric}_bucket{{{matcher}}}[$__rate_interval])))"


def quantiles(metric: str, by: str = "model", matcher: str = MODEL) -> list[Query]:
    """Return the queries for the median, the 95th and the 99th percentile of a histogram, by the label `by`."""
    return [
        (quantile(share, metric, by, matcher), f"{{{{{by}}}}} p{round(share * 100)}") for share in (0.5, 0.95, 0.99)
    ]


def thresholds(steps: Steps) -> builders.ThresholdsConfig:
    """Return the thresholds of a panel. Each step is a value, and the colour from this value up to the next step. The
    first step has the value None: its colour is for all smaller values."""
    made = [dashboard.Threshold(value, color) for value, color in steps]
    return builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(made)


def _target(at: int, expression: str, legend: str, *, instant: bool = False) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(expression).legend_format(legend or "__auto").ref_id(chr(ord("A") + at))
    if instant:
        return query.instant().format(prometheus_models.PromQueryFormat.TABLE)
    return query.range()


def runbook(alert: str) -> builders.DashboardLink:
    """Return the link from a panel to the runbook of an alert."""
    return (
        builders.DashboardLink(f"Runbook {alert}")
        .type(dashboard.DashboardLinkType.LINK)
        .url(f"{RUNBOOKS}/{alert}.md")
        .target_blank(True)
    )


def runbook_of_row() -> builders.DashboardLink:
    """Return the link from each row of a table to the runbook of the row's alert. The column `alertname` names the
    alert."""
    return (
        builders.DashboardLink("Runbook")
        .type(dashboard.DashboardLinkType.LINK)
        .url(f"{RUNBOOKS}/${{__data.fields.alertname}}.md")
        .target_blank(True)
    )


def to_board(name: str, variable: str = "", label: str = "") -> builders.DashboardLink:
    """Return a link from a panel to the dashboard `name`. `variable`: the variable that the link sets in that
    dashboard; "" for none. `label`: the label of the clicked series that gives the variable's value; "" for the label
    named `variable`."""
    address = f"/d/headrace-{name}?var-datasource=${{datasource}}&var-cluster=${{cluster}}"
    if variable:
        address += f"&var-{variable}=${{__data.fields.{label or variable}}}"
    return builders.DashboardLink(f"Dashboard {BOARDS[name]}").type(dashboard.DashboardLinkType.LINK).url(address)


@dataclass
class Board:
    """Builder of a dashboard. Panels are placed from left to right, in the order in which they are added."""

    name: str
    description: str
    variables: Sequence[str] = ()
    """Names in VARIABLES. Every dashboard also has the variables `datasource` and `cluster`."""
    made: builders.Dashboard = field(init=False)
    _x: int = 0
    _y: int = 0
    _height: int = 0

    def __post_init__(self) -> None:
        self.made = (
            builders.Dashboard(f"Headrace: {BOARDS[self.name].lower()}")
            .uid(f"headrace-{self.name}")
            .description(self.description)
            .tags(["headrace"])
            .refresh("30s")
            .time("now-3h", "now")
            .editable()
            .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
            .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
            .with_variable(_variable("cluster", "Cluster", "label_values(headrace_build_info, headrace_cluster)"))
        )
        for variable in self.variables:
            self.made.with_variable(VARIABLES[variable])
        self.made.link(
            builders.DashboardLink("Headrace")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["headrace"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        self.made.link(
            builders.DashboardLink("Runbooks").type(dashboard.DashboardLinkType.LINK).url(f"{RUNBOOKS}/README.md")
        )
        for annotation in ANNOTATIONS:
            self.made.annotation(annotation)

    def row(self, title: str) -> None:
        """Begin a row of panels."""
        self._y += self._height
        self.made.with_row(builders.Row(title).grid_pos(dashboard.GridPos(h=1, w=COLUMNS, x=0, y=self._y)))
        self._x, self._y, self._height = 0, self._y + 1, 0

    def _place(self, width: int, height: int) -> dashboard.GridPos:
        """Return the place of the next panel: right of the last panel, or in the next line if there is no room."""
        if self._x + width > COLUMNS:
            self._x, self._y, self._height = 0, self._y + self._height, 0
        place = dashboard.GridPos(h=height, w=width, x=self._x, y=self._y)
        self._x, self._height = self._x + width, max(self._height, height)
        return place

    def stat(
        self, title: str, description: str, query: str, unit: str, steps: Steps = (), *links: builders.DashboardLink
    ) -> None:
        """Add a panel with one number. `steps`: thresholds that colour the number."""
        panel = (
            stat.Panel()
            .title(title)
            .description(description)
            .datasource(SOURCE)
            .unit(unit)
            .grid_pos(self._place(4, 4))
            .thresholds(thresholds(steps or ((None, GREEN),)))
            .color_mode(common.BigValueColorMode.VALUE)
            .graph_mode(common.BigValueGraphMode.AREA)
            .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
            .with_target(_target(0, query, "", instant="$__range" in query))
        )
        if links:
            panel.links(list(links))
        self.made.with_panel(panel)

    def series(
        self,
        title: str,
        description: str,
        queries: Sequence[Query],
        unit: str,
        steps: Steps = (),
        *links: builders.DashboardLink,
        span: int = 12,
    ) -> None:
        """Add a panel with series over time. `steps`: thresholds, which are drawn as lines."""
        panel = (
            timeseries.Panel()
            .title(title)
            .description(description)
            .datasource(SOURCE)
            .unit(unit)
            .min(0)
            .grid_pos(self._place(span, 8))
            .fill_opacity(8)
            .show_points(common.VisibilityMode.NEVER)
            .tooltip(
                common_builders.VizTooltipOptions()
                .mode(common.TooltipDisplayMode.MULTI)
                .sort(common.SortOrder.DESCENDING)
            )
            .legend(
                common_builders.VizLegendOptions()
                .show_legend(True)
                .display_mode(common.LegendDisplayMode.TABLE)
                .placement(common.LegendPlacement.BOTTOM)
                .calcs(["lastNotNull", "max"])
            )
        )
        if steps:
            style = common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
            panel.thresholds(thresholds(steps)).thresholds_style(style)
        if links:
            panel.links(list(links))
        for at, (expression, legend) in enumerate(queries):
            panel.with_target(_target(at, expression, legend))
        self.made.with_panel(panel)

    def table(
        self,
        title: str,
        description: str,
        columns: Mapping[str, str],
        units: Mapping[str, str],
        *,
        span: int = 24,
        link: tuple[str, builders.DashboardLink] | None = None,
    ) -> None:
        """Add a table with the current values. `columns`: the query of each column, by its title; rows are joined on
        their labels. `units`: the units of the columns that have a unit. `link`: a column, and the link that its cells
        have."""
        names = {f"Value #{chr(ord('A') + at)}": name for at, name in enumerate(columns)}
        panel = (
            table.Panel()
            .title(title)
            .description(description)
            .datasource(SOURCE)
            .grid_pos(self._place(span, 8))
            .with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
            .with_transformation(
                dashboard.DataTransformerConfig(
                    id_val="organize",
                    options={"renameByName": names if len(columns) > 1 else {"Value": next(iter(columns))}}
                    | {"excludeByName": {"Time": True}},
                )
            )
        )
        for at, query in enumerate(columns.values()):
            panel.with_target(_target(at, query, "", instant=True))
        for column, unit in units.items():
            panel.override_by_name(column, [dashboard.DynamicConfigValue("unit", unit)])
        if link is not None:
            column, to = link
            panel.override_by_name(column, [dashboard.DynamicConfigValue("links", [to.build()])])
        self.made.with_panel(panel)

    def text(self) -> str:
        """Return the dashboard as JSON. The panels are numbered."""
        whole = self.made.build()
        for at, panel in enumerate(whole.panels or [], 1):
            panel.id_val = at
        document = json.loads(json.dumps(whole, cls=JSONEncoder))
        for annotation in document["annotations"]["list"]:
            annotation["titleFormat"] = TITLES[annotation["name"]]  # a field that the library does not know
        return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _variable(name: str, label: str, query: str, *, several: bool = False) -> builders.QueryVariable:
    made = builders.QueryVariable(name).label(label).query(query).datasource(SOURCE)
    made.refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    return made.multi(True).include_all(True).all_value(".*") if several else made


VARIABLES: Mapping[str, Any] = {
    "model": _variable("model", "Model", f"label_values(headrace_model_replicas{{{CLUSTER}}}, model)", several=True),
    "tenant": _variable(
        "tenant", "Tenant", f"label_values(headrace_requests_total{{{CLUSTER}}}, tenant)", several=True
    ),
    "price": builders.TextBoxVariable("price")
    .label("Price of a GPU-hour")
    .description("What an hour of one GPU costs. `headrace usage --cost` has prices by type of GPU.")
    .default_value("2.50"),
}


def _annotation(name: str, color: str, expression: str) -> builders.AnnotationQuery:
    return builders.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color).expr(expression)


LOST = 'reason=~"lost|hung|deaf|mute|silent"'
ANNOTATIONS = (
    _annotation(
        "Alerts",
        RED,
        f'max by (alertname, severity, model) (ALERTS{{alertname=~"Headrace.+",alertstate="firing",'
        f'severity=~"page|ticket",{CLUSTER}}})',
    ),
    _annotation(
        "Faults: workers lost",
        YELLOW,
        f"sum by (model, reason) (increase(headrace_worker_detected_total{{{CLUSTER},{LOST}}}[1m])) > 0",
    ),
    _annotation(
        "Rollouts: two versions of a model",
        "blue",
        f"count by (model) (count by (model, version) (headrace_model_version_workers{{{CLUSTER}}} > 0)) > 1",
    ),
    _annotation(
        "Rollouts: two releases at once",
        "purple",
        f"count by (headrace_cluster) (count by (headrace_cluster, version) (headrace_build_info{{{CLUSTER}}})) > 1",
    ),
)
TITLES = {
    "Alerts": "{{alertname}} {{model}}",
    "Faults: workers lost": "{{model}}: worker {{reason}}",
    "Rollouts: two versions of a model": "{{model}}: workers of two versions",
    "Rollouts: two releases at once": "processes of two releases",
}
"""Titles of the annotations. Prometheus' labels replace the names in braces."""
