// What a pass does to a model's modules and parameters so often that Python would be slow: parameters are pointed at
// weights and hidden again once a lane and unit, and every module is looked at once a step.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "common/check.h"

namespace distzo2 {
namespace {

namespace py = pybind11;

// The parameters are Python's, in lists of Python's: a reference from here would be one that its collector cannot see.
at::Tensor unpack(const py::list& tensors, size_t i) {
    PyObject* item = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    if (!THPVariable_Check(item))
        throw py::type_error("expected a list of tensors");
    return THPVariable_Unpack(item);
}

void set_class(const py::list& objects, size_t i, PyObject* cls) {
    static PyObject* const name = PyUnicode_InternFromString("__class__");
    PyObject* object = PyList_GET_ITEM(objects.ptr(), static_cast<Py_ssize_t>(i));
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != cls && PyObject_SetAttr(object, name, cls) != 0)
        throw py::error_already_set();
}

std::vector<int64_t> show_parameters(const py::list& params, const py::list& classes, const py::list& weights) {
    DZO_CHECK(params.size() == classes.size() && params.size() == weights.size(),
              "show_parameters: expected a class and weights for each parameter");
    std::vector<int64_t> versions;
    versions.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
        set_class(params, i, PyList_GET_ITEM(classes.ptr(), static_cast<Py_ssize_t>(i)));
        at::Tensor param = unpack(params, i);
        if (param.requires_grad()) // after an edit; autocast would cache one lane's weights for all
            param.requires_grad_(false);
        param.set_data(unpack(weights, i));
        versions.push_back(param._version());
    }
    return versions;
}

std::vector<size_t> hide_parameters(const py::list& params, const py::object& absent, const py::list& placeholders,
                                    const std::vector<int64_t>& versions) {
    DZO_CHECK(params.size() == placeholders.size() && (versions.empty() || params.size() == versions.size()),
              "hide_parameters: expected a placeholder and a version for each parameter");
    std::vector<size_t> written;
    for (size_t i = 0; i < params.size(); ++i) {
        at::Tensor param = unpack(params, i);
        if (!versions.empty() && param._version() != versions[i])
            written.push_back(i);
        param.set_data(unpack(placeholders, i));
        set_class(params, i, absent.ptr());
    }
    return written;
}

// Calls visit(key, value) for the items of an attribute that is a dict, such as `_modules`. Scripted modules have
// something like a dict, which is not in their own one.
template <typename Visit>
void for_each_item(PyObject* own, py::handle module, PyObject* name, Visit visit) {
    PyObject* items = PyDict_GetItem(own, name);
    if (items != nullptr && PyDict_Check(items)) {
        PyObject *key, *value;
        for (Py_ssize_t position = 0; PyDict_Next(items, &position, &key, &value);)
            visit(py::handle(key), py::handle(value));
        return;
    }
    for (py::handle item : py::getattr(module, name).attr("items")()) {
        const auto pair = py::reinterpret_borrow<py::tuple>(item);
        visit(py::handle(pair[0]), py::handle(pair[1]));
    }
}

py::tuple walk_modules(py::object model) {
    static PyObject* const modules_name = PyUnicode_InternFromString("_modules");
    static PyObject* const buffers_name = PyUnicode_InternFromString("_buffers");
    static PyObject* const training_name = PyUnicode_InternFromString("training");
    static PyObject* const config_name = PyUnicode_InternFromString("config");
    py::list slots, configs;
    std::unordered_set<PyObject*> seen, seen_configs;
    std::unordered_map<PyTypeObject*, bool> types;
    const auto has_config = [&types](PyTypeObject* type) {
        const auto [found, added] = types.try_emplace(type, false);
        if (added)
            found->second = py::hasattr(reinterpret_cast<PyObject*>(type), "config");
        return found->second;
    };
    std::vector<py::object> waiting{std::move(model)}; // the next one last
    bool training = false;
    while (!waiting.empty()) {
        const py::object module = std::move(waiting.back());
        waiting.pop_back();
        if (!seen.insert(module.ptr()).second)
            continue;
        const auto own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
        if (!own)
            throw py::error_already_set();
        if (PyObject* flag = PyDict_GetItem(own.ptr(), training_name))
            training |= flag == Py_True;
        py::object config;
        if (PyObject* item = PyDict_GetItem(own.ptr(), config_name))
            config = py::reinterpret_borrow<py::object>(item);
        else if (has_config(Py_TYPE(module.ptr()))) // a property, or of the class
            config = py::getattr(module, config_name, py::none());
        if (config && !config.is_none() && seen_configs.insert(config.ptr()).second)
            configs.append(config);
        for_each_item(own.ptr(), module, buffers_name,
                      [&](py::handle name, py::handle) { slots.append(py::make_tuple(module, name)); });
        const size_t first = waiting.size();
        for_each_item(own.ptr(), module, modules_name, [&](py::handle, py::handle child) {
            if (!child.is_none())
                waiting.push_back(py::reinterpret_borrow<py::object>(child));
        });
        std::reverse(waiting.begin() + static_cast<std::ptrdiff_t>(first), waiting.end());
    }
    return py::make_tuple(slots, configs, training);
}

} // namespace

void register_modules(py::module_& m) {
    m.def("show_parameters", &show_parameters, py::arg("params"), py::arg("classes"), py::arg("weights"),
          "Gives each parameter its class and points it at its weights; returns torch's counters of writes.");
    m.def("hide_parameters", &hide_parameters, py::arg("params"), py::arg("absent"), py::arg("placeholders"),
          py::arg("versions"), R"(Points parameters at placeholders, of class `absent`.

Args:
    versions: what show_parameters returned, or nothing.

Returns:
    The places of the parameters that were written since.)");
    m.def("walk_modules", &walk_modules, py::arg("model"), R"(Looks at every module of a model once.

Returns:
    The (module, name) of each buffer, in the order of model.modules(); the objects that modules have as `config`, each
    once; and whether any module is in training mode.)");
}

} // namespace distzo2
